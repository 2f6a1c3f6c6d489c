"""How each method is shown in figures: its name, its kind, its colour and line.

Colours are Okabe and Ito's, or near them: colour-blind readers can tell them apart. Line styles and
markers help in print.
"""

from typing import Any, NamedTuple


class Kind(NamedTuple):
    """A kind of method, which has one colour and one marker where many methods are in one figure.

    Attributes:
      label: Its name in a legend.
      colour: As `#rrggbb`.
      marker: One of Matplotlib's.
    """

    label: str
    colour: str
    marker: str


class Style(NamedTuple):
    """How one method is shown.

    Attributes:
      name: Its name for people.
      kind: Gives colour and marker where there is one point for each method.
      colour: Of its learning curve.
      line: The line style of its learning curve, one of Matplotlib's.
    """

    name: str
    kind: Kind
    colour: str = "#CC79A7"
    line: Any = "-"


DENSE = Kind("dense", "#000000", "s")
FIXED = Kind("mask chosen before training", "#B35900", "D")
REWIRED = Kind("rewired, sparse throughout", "#0072B2", "o")
BY_DENSE_GRADIENTS = Kind("rewired or masked by dense gradients", "#007A5A", "^")
PRUNED = Kind("from dense to sparse", "#B0497F", "v")
OTHER = Kind("other", "#CC79A7", "o")

_STYLES = {
    "dense": Style("dense", DENSE, "#000000", ":"),
    "small_dense": Style("Small-Dense", DENSE, "#6E6E6E", (0, (1, 3))),
    "static": Style("static", FIXED, "#E69F00", "--"),
    "snip": Style("SNIP", FIXED),
    "grasp": Style("GraSP", FIXED),
    "synflow": Style("SynFlow", FIXED),
    "lottery": Style("ticket", FIXED),
    "spdf": Style("sparse, then dense", FIXED),
    "set": Style("SET", REWIRED, "#009E73", "-."),
    "mest": Style("MEST", REWIRED),
    "mest_soft": Style("MEST, soft", REWIRED),
    "cht": Style("CHT", REWIRED),
    "cht_soft": Style("CHT, soft", REWIRED),
    "deepr": Style("DeepR", REWIRED),
    "dsr": Style("DSR", REWIRED),
    "rigl": Style("RigL", REWIRED, "#0072B2", "-"),
    "rigl_itop": Style("RigL, ITOP", REWIRED),
    "lottery_rigl": Style("ticket, RigL", REWIRED),
    "snfs": Style("SNFS", BY_DENSE_GRADIENTS, "#56B4E9", (0, (5, 1, 1, 1))),
    "snfs_redistribute": Style("SNFS, redistributed", BY_DENSE_GRADIENTS),
    "top_kast": Style("Top-KAST", BY_DENSE_GRADIENTS),
    "dnw": Style("DNW", BY_DENSE_GRADIENTS),
    "gmp": Style("pruning", PRUNED, "#D55E00", (0, (7, 2))),
    "gmp_global": Style("pruning, global", PRUNED),
    "gmp_25_75": Style("pruning, 25-75 %", PRUNED),
    "granet": Style("GraNet", PRUNED),
    "acdc": Style("AC/DC", PRUNED),
    "iht": Style("IHT", PRUNED),
    "str": Style("STR", PRUNED),
}


def of(method: str) -> Style:
    """Looks a method up by its name in a config; one that is not listed keeps that name."""
    return _STYLES.get(method, Style(method, OTHER))
