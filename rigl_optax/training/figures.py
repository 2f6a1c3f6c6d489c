"""Pictures of a comparison: learning curves, and where the input connections go."""

import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from rigl_optax.training.score import Score

# Okabe and Ito's colours: told apart by colour-blind readers; styles help in print.
STYLES: dict[str, tuple[str, Any]] = {
    "dense": ("#000000", ":"),
    "static": ("#E69F00", "--"),
    "set": ("#009E73", "-."),
    "rigl": ("#0072B2", "-"),
    "small_dense": ("#6E6E6E", (0, (1, 3))),
    "snfs": ("#56B4E9", (0, (5, 1, 1, 1))),
    "gmp": ("#D55E00", (0, (7, 2))),
}
OTHER: tuple[str, Any] = ("#CC79A7", "-")
NAMES = {
    "small_dense": "Small-Dense",
    "snip": "SNIP",
    "grasp": "GraSP",
    "synflow": "SynFlow",
    "set": "SET",
    "deepr": "DeepR",
    "snfs": "SNFS",
    "snfs_redistribute": "SNFS, redistributed",
    "dsr": "DSR",
    "rigl": "RigL",
    "rigl_itop": "RigL, ITOP",
    "gmp": "pruning",
    "gmp_global": "pruning, global",
    "granet": "GraNet",
    "top_kast": "Top-KAST",
    "dnw": "DNW",
    "str": "STR",
    "lottery": "ticket",
    "lottery_rigl": "ticket, RigL",
}
# In a scatter of many methods a colour and a marker stand for a kind of method.
KINDS = {
    "dense": ("#000000", "s", ("small_dense",)),
    "mask chosen before training": (
        "#B35900",
        "D",
        ("static", "snip", "grasp", "synflow", "lottery"),
    ),
    "rewired, sparse throughout": (
        "#0072B2",
        "o",
        ("set", "deepr", "dsr", "rigl", "rigl_itop", "lottery_rigl"),
    ),
    "rewired or masked by dense gradients": (
        "#007A5A",
        "^",
        ("snfs", "snfs_redistribute", "top_kast", "dnw"),
    ),
    "from dense to sparse": ("#B0497F", "v", ("gmp", "gmp_global", "granet", "str")),
}
SAVE: dict[str, Any] = {
    "dpi": 150,
    "metadata": {"Software": f"matplotlib {matplotlib.__version__}"},
}


class Curve(NamedTuple):
    """One method's validation metrics.

    Attributes:
      method: Its name.
      steps: (points,) training steps.
      score: (seeds, points) as shown: accuracy in percent, or bits per byte.
      loss: (seeds, points) in nats.
    """

    method: str
    steps: np.ndarray
    score: np.ndarray
    loss: np.ndarray


def learning_curves(
    panels: dict[float, Sequence[Curve]], title: str, path: pathlib.Path, judged: Score
) -> None:
    """Validation score and loss against the step: mean over seeds, and a band from min to max.

    Args:
      panels: Curves at each sparsity; a row of two panels each, or one panel where the score is
        the loss in other units.
      title: Above all.
      path: The PNG to write.
      judged: The score.
    """
    kinds = {"score": judged.title} | ({} if judged.is_loss else {"loss": "loss (nats)"})
    size = (5 * len(kinds), 3.9 * len(panels)) if len(kinds) > 1 else (7.5, 4.4 * len(panels))
    figure = Figure(figsize=(size[0], size[1] + 0.4), layout="constrained")
    axes = figure.subplots(len(panels), len(kinds), squeeze=False)
    for row, (sparsity, curves) in zip(axes, panels.items(), strict=True):
        for axis, (kind, label) in zip(row, kinds.items(), strict=True):
            for curve in curves:
                colour, line = STYLES.get(curve.method, OTHER)
                values = getattr(curve, kind)
                name = NAMES.get(curve.method, curve.method)
                axis.plot(curve.steps, values.mean(0), ls=line, color=colour, label=name)
                band = (values.min(0), values.max(0))
                axis.fill_between(curve.steps, *band, color=colour, alpha=0.15, linewidth=0)
            shown = judged.label if kind == "score" else kind
            axis.set_title(f"Validation {shown}, {100 * sparsity:g} % sparse", fontsize=11)
            axis.set_xlabel("training step")
            axis.set_ylabel(label)
            axis.grid(alpha=0.3)
            _fit(axis, curves, kind)
        row[0].legend(loc="upper right" if judged.is_loss else "lower right", frameon=True)
    figure.suptitle(title, fontsize=12)
    figure.savefig(path, **SAVE)


def score_against_cost(
    records: Sequence[dict[str, Any]], title: str, path: pathlib.Path, judged: Score
) -> None:
    """Test score against training FLOPs: a panel for each sparsity, a point for each method.

    Args:
      records: From `summary.summary`; those without a sparsity are lines across.
      title: Above all.
      path: The PNG to write.
      judged: The score.
    """
    sparsities = sorted({r["sparsity"] for r in records if r["sparsity"] is not None})
    figure = Figure(figsize=(5.4 * len(sparsities), 7), layout="constrained")
    axes = figure.subplots(1, len(sparsities), squeeze=False)[0]
    drawn: dict[str, tuple[str, str]] = {}
    for axis, sparsity in zip(axes, sparsities, strict=True):
        here = [r for r in records if r["sparsity"] == sparsity]
        names = [NAMES.get(r["method"], r["method"]) for r in here]
        for record in records:
            if record["sparsity"] is None:
                axis.axhline(record["mean"], color="#000000", linestyle=":", linewidth=1)
                axis.annotate(
                    f"{NAMES.get(record['method'], record['method'])} (100 %)",
                    (1, record["mean"]),
                    (-4, 4),
                    xycoords=("axes fraction", "data"),
                    textcoords="offset points",
                    fontsize=8,
                    ha="right",
                )
        costs, means = ([r[key] for r in here] for key in ("training_flops", "mean"))
        axis.set_xscale("log")
        axis.set_xlim(0.85 * min(costs), 3.2 * max(costs))  # room for the names
        shown = [*means, *(r["mean"] for r in records if r["sparsity"] is None)]
        margin = 0.06 * (max(shown) - min(shown)) or 1.0
        axis.set_ylim(min(shown) - 2 * margin, max(shown) + 2 * margin)
        for record, name, (dx, dy) in zip(
            here, names, _apart(axis, costs, means, names), strict=True
        ):
            kind = next((k for k, v in KINDS.items() if record["method"] in v[2]), None)
            colour, marker = KINDS[kind][:2] if kind else (OTHER[0], "o")
            drawn.setdefault(kind or "other", (colour, marker))
            at = (record["training_flops"], record["mean"])
            axis.errorbar(
                *at,
                record["std"],  # None, of one seed: no bar
                fmt=marker,
                markersize=5,
                color=colour,
                elinewidth=0.7,
                capsize=2,
            )
            axis.annotate(
                name,
                at,
                (dx, dy),
                textcoords="offset points",
                fontsize=8,
                va="center",
                color=colour,
                arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.4, "shrinkB": 3},
            )
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{100 * x:g} %"))
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.set_title(f"{100 * sparsity:g} % sparse", fontsize=11)
        axis.set_xlabel("training FLOPs, relative to dense training")
        axis.set_ylabel(f"test {judged.title}")
        axis.grid(alpha=0.3)
    handles = [
        Line2D([], [], color=colour, marker=marker, linestyle="", label=kind)
        for kind, (colour, marker) in drawn.items()
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=9)
    figure.suptitle(title, fontsize=12)
    figure.savefig(path, **SAVE)


def _apart(
    axis: Axes, costs: Sequence[float], heights: Sequence[float], names: Sequence[str]
) -> list[tuple[float, float]]:
    """Offsets in points at which names beside their points do not lie on each other.

    Names that share a stretch of the axis are pushed apart until they are a line's height from
    each other. The limits of the axis must be set.
    """
    line, wide, tall = 10.0, 340.0, 400.0  # points: of a line, and of the axis, roughly
    low, high = axis.get_ylim()
    left, right = np.log(axis.get_xlim())
    x = (np.log(costs) - left) / (right - left) * wide + 12
    y = (np.asarray(heights) - low) / (high - low) * tall
    ends = x + 5.0 * np.array([len(name) for name in names])
    at = y.copy()
    share = (x[:, None] < ends) & (x < ends[:, None])
    np.fill_diagonal(share, False)
    for _ in range(500):
        gap = at[:, None] - at
        above = np.where(gap != 0, gap, np.arange(len(at))[:, None] - np.arange(len(at))) > 0
        missing = np.where(share, np.clip(line - np.abs(gap), 0, None), 0)
        at += np.where(above, missing, -missing).sum(1) / 4
    return [(12.0, float(dy)) for dy in at - y]


class Connections(NamedTuple):
    """Live connections of each input pixel, of one network: int arrays (height, width)."""

    method: str
    before: np.ndarray
    after: np.ndarray


def input_connections(
    panels: dict[float, Sequence[Connections]], title: str, path: pathlib.Path
) -> None:
    """Heat maps of how many connections each pixel has to the first layer.

    Args:
      panels: At each sparsity, the methods; a row each: before and after side by side.
      title: Above all.
      path: The PNG to write.
    """
    rows = [(sparsity, maps) for sparsity, several in panels.items() for maps in several]
    figure = Figure(figsize=(7.2, 3.3 * len(rows) + 0.5), layout="constrained")
    axes = figure.subplots(len(rows), 2, squeeze=False)
    for sparsity, several in panels.items():
        own = [row for row, (s, _) in zip(axes, rows, strict=True) if s == sparsity]
        highest = max(int(m.max()) for maps in several for m in (maps.before, maps.after))
        for row, maps in zip(own, several, strict=True):
            name = NAMES.get(maps.method, maps.method)
            for axis, when in zip(row, ("before", "after"), strict=True):
                counts = getattr(maps, when)
                image = axis.imshow(counts, vmin=0, vmax=highest, cmap="cividis")
                dead = int((counts == 0).sum())
                axis.set_title(
                    f"{name}, {100 * sparsity:g} % sparse, {when} training\n"
                    f"{dead} of {counts.size} pixels unused",
                    fontsize=10,
                )
                axis.set_xlabel("pixel column")
                axis.set_ylabel("pixel row")
        figure.colorbar(image, ax=list(np.ravel(own)), label="live connections of the pixel")
    figure.suptitle(title, fontsize=12)
    figure.savefig(path, **SAVE)


def _fit(axis: Axes, curves: Sequence[Curve], kind: str) -> None:
    """Limits to what happens after the first tenth: the start would squash the rest."""
    late = [getattr(c, kind)[:, c.steps >= c.steps[-1] / 10] for c in curves]
    low, high = min(float(x.min()) for x in late), max(float(x.max()) for x in late)
    margin = 0.05 * (high - low) or 0.01
    axis.set_ylim(low - margin, high + margin)
