"""Every method with every option on every structure: what it does, and what it refuses.

One table, two readers: `test_combinations.py` runs or refuses each cell, and `docs/combinations.py`
prints it into `docs/methods.md`.
"""

import functools

import optax

import rigl_optax
from rigl_optax import NM, Block, ConstantFanIn, Grown, Unstructured

STRUCTURES = {
    "single weights": Unstructured(),
    "`Block`": Block(2, 2),
    "`Block(pad=True)`": Block(4, 5, pad=True),
    "`ConstantFanIn()`": ConstantFanIn(),
    "`ConstantFanIn(min_salient)`": ConstantFanIn(min_salient=0.3),
    "`NM`": NM(2, 4),
}
SINGLE, BLOCK, PAD, FAN_IN, ABLATED, N_M = STRUCTURES
ALL = tuple(STRUCTURES)
NO_ABLATION = (SINGLE, BLOCK, PAD, FAN_IN, N_M)
BLOCKS = (SINGLE, BLOCK, PAD)
EQUAL = (SINGLE, BLOCK)  # what moves between layers needs groups of one size

PLAN = {"end": 9, "every": 2, "drop_fraction": rigl_optax.constant_drop_fraction(0.5)}
PRUNING = {"end": 9, "every": 2}

METHODS = {
    "static_sparse": rigl_optax.static_sparse,
    "rigl": functools.partial(rigl_optax.rigl, **PLAN),
    "sparse_evolutionary_training": functools.partial(
        rigl_optax.sparse_evolutionary_training, **PLAN
    ),
    "mest": functools.partial(rigl_optax.mest, **PLAN),
    "mest(soft=True)": functools.partial(rigl_optax.mest, soft=True, **PLAN),
    "cht": functools.partial(rigl_optax.cht, **PLAN),
    "cht(soft=True)": functools.partial(rigl_optax.cht, soft=True, **PLAN),
    "sparse_momentum": functools.partial(rigl_optax.sparse_momentum, **PLAN),
    "sparse_momentum(redistribute=True)": functools.partial(
        rigl_optax.sparse_momentum, redistribute=True, **PLAN
    ),
    "dynamic_sparse_reparameterization": functools.partial(
        rigl_optax.dynamic_sparse_reparameterization, initial_threshold=0.5, **PLAN
    ),
    "gradual_magnitude_pruning": functools.partial(rigl_optax.gradual_magnitude_pruning, **PRUNING),
    'gradual_magnitude_pruning(scope="global")': functools.partial(
        rigl_optax.gradual_magnitude_pruning, scope="global", **PRUNING
    ),
    'granet(scope="layer")': functools.partial(rigl_optax.granet, scope="layer", **PLAN),
    "granet": functools.partial(rigl_optax.granet, **PLAN),
    "spdf": functools.partial(rigl_optax.spdf, dense_from=4),
    "acdc": functools.partial(rigl_optax.acdc, **PRUNING),
    'acdc(scope="global")': functools.partial(rigl_optax.acdc, scope="global", **PRUNING),
    "iterative_hard_thresholding": functools.partial(
        rigl_optax.iterative_hard_thresholding, end=9, every=2
    ),
    "top_kast": functools.partial(rigl_optax.top_kast, backward_sparsity=0.0, every=2),
    "dnw": functools.partial(rigl_optax.dnw, every=2),
    "deep_rewiring": functools.partial(rigl_optax.deep_rewiring, learning_rate=0.1, every=2),
    "soft_thresholding": functools.partial(
        lambda inner, layers, **keys: rigl_optax.soft_thresholding(
            inner, layers, threshold_decay=0.1, **keys
        )
    ),
}
CHT = ("cht", "cht(soft=True)")
DROP_AND_GROW = ("rigl", "sparse_evolutionary_training", "mest", *CHT, "sparse_momentum")
SOFT = "mest(soft=True)"
REDISTRIBUTED = "sparse_momentum(redistribute=True)"
IN_TOTAL = (REDISTRIBUTED, "dynamic_sparse_reparameterization")
OVER_LAYERS = (
    *IN_TOTAL,
    'gradual_magnitude_pruning(scope="global")',
    "granet",
    'acdc(scope="global")',
)
FALLING = tuple(name for name in METHODS if name.startswith(("gra", "granet", "iter")))
ALTERNATING = ("acdc", 'acdc(scope="global")')
LEARNED = ("soft_thresholding",)
SINGLES = ("soft_thresholding",)  # it takes no `structure`

OPTIONS = {
    "none": {},
    "`overrides`": {"overrides": {"1$": {"every": 4}}},
    "`min_fan_in`": {"min_fan_in": 2},
    "`accumulate`": {"accumulate": 2},
    "`candidates`": {"candidates": 1.5},
    "`gradient_step`": {"gradient_step": True},
    "`grown`": {"grown": Grown("gradient", 4.0)},
    "`initial_masks`": {"initial_masks": None},  # drawn where they are needed
    "`initial_sparsity`": {"initial_sparsity": 0.25},
    "`stacked`": {},
}
(
    NONE,
    OVERRIDES,
    MIN_FAN_IN,
    ACCUMULATE,
    CANDIDATES,
    GRADIENT_STEP,
    GROWN,
    MASKS,
    SPARSER,
    STACKED,
) = OPTIONS


def takes(method):
    """The options that a method has."""
    found = [NONE, STACKED]
    if method in (*DROP_AND_GROW, REDISTRIBUTED):
        found += [OVERRIDES, MIN_FAN_IN, GRADIENT_STEP, GROWN]
    if method == "rigl":
        found += [ACCUMULATE, CANDIDATES]
    if method == "dynamic_sparse_reparameterization" or method.startswith("granet"):
        found += [GRADIENT_STEP, GROWN]
    if method == SOFT:
        found += [MIN_FAN_IN, GRADIENT_STEP, GROWN]
    if method in CHT:
        found += [SPARSER]
    if method in FALLING:
        found += [SPARSER, MIN_FAN_IN if method.startswith("iter") else GRADIENT_STEP]
    if method in (*ALTERNATING, "spdf"):
        found += [GRADIENT_STEP]
    if method not in (*LEARNED, *ALTERNATING):
        found += [MASKS]
    return [option for option in OPTIONS if option in found]


def does(method, option):
    """The structures on which a method does what an option says; it refuses the others."""
    if method in SINGLES:
        return (SINGLE,)
    if method == "deep_rewiring":
        return (SINGLE, FAN_IN, N_M)  # a block has no sign
    if method in OVER_LAYERS:
        return EQUAL
    if method == SOFT:
        return BLOCKS  # the others fix numbers
    if option == MIN_FAN_IN:
        return BLOCKS
    found = ALL if method in DROP_AND_GROW and option != SPARSER else NO_ABLATION
    # n:m is one sparsity, from the start to the end.
    return tuple(s for s in found if s != N_M) if option == SPARSER else found


def build(method, option_names, structure, masks=None, stacked=False):
    """The method around SGD."""
    keys = {}
    for option in option_names:
        keys |= OPTIONS[option]
    if MASKS in option_names:
        keys["initial_masks"] = masks
    if method not in SINGLES:
        keys["structure"] = structure
    layers = rigl_optax.uniform(0.5, stacked=(".",) if stacked else ())
    return METHODS[method](optax.sgd(0.1, momentum=0.9), layers, **keys)


_LETTERS = dict(zip(STRUCTURES, "SBPFAN", strict=True))


def rows():
    """Of the page: a row for each method, a column for each option."""
    shown = [o for o in OPTIONS if o != NONE]
    lines = ["| | no option | " + " | ".join(shown) + " |", "|---" * (len(shown) + 2) + "|"]
    for method in METHODS:
        cells = [f"`{method}`"]
        for option in OPTIONS:
            found = does(method, option) if option in takes(method) else ()
            cells.append("".join(_LETTERS[s] for s in found))
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def legend():
    """What the letters stand for."""
    return ", ".join(f"{letter} {name}" for name, letter in _LETTERS.items())
