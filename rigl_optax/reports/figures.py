"""Draws a comparison as PNG: learning curves, score against cost, connections of input pixels."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from rigl_optax.reports import styles
from rigl_optax.training.score import Score

SAVE: dict[str, Any] = {
    "dpi": 150,
    "metadata": {"Software": f"matplotlib {matplotlib.__version__}"},
}


class Curve(NamedTuple):
    """One method's validation metrics.

    Attributes:
      method: The method, and its structure if it has one.
      steps: (points,) training steps.
      score: (seeds, points) as shown: accuracy in percent, or bits per byte.
      loss: (seeds, points) in nats.
    """

    method: str
    steps: np.ndarray
    score: np.ndarray
    loss: np.ndarray


def learning_curves(
    panels: Mapping[float, Sequence[Curve]], title: str, path: pathlib.Path, judged: Score
) -> None:
    """Draws validation score and loss against the step: means over seeds in bands from min to max.

    Args:
      panels: Curves at each sparsity; a row of two panels each, or one panel where the score is
        the loss in other units.
      title: Stands above the figure.
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
                name, _, colour, line = styles.of(curve.method)
                values = getattr(curve, kind)
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
    """Draws test score against training FLOPs: a panel for each sparsity, a point for each method.

    Args:
      records: From `summary.summary`; those without a sparsity become horizontal lines.
      title: Stands above the figure.
      path: The PNG to write.
      judged: The score.
    """
    sparsities = sorted({r["sparsity"] for r in records if r["sparsity"] is not None})
    figure = Figure(figsize=(5.4 * len(sparsities), 7), layout="constrained")
    axes = figure.subplots(1, len(sparsities), squeeze=False)[0]
    without = [record for record in records if record["sparsity"] is None]
    kinds: dict[styles.Kind, None] = {}  # in the order in which they are drawn
    for axis, sparsity in zip(axes, sparsities, strict=True):
        here = [record for record in records if record["sparsity"] == sparsity]
        kinds |= dict.fromkeys(styles.of(record["method"]).kind for record in here)
        _set_limits(axis, here, without)
        for record in without:
            _draw_level(axis, record)
        _draw_points(axis, here)
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{100 * x:g} %"))
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.set_title(f"{100 * sparsity:g} % sparse", fontsize=11)
        axis.set_xlabel("training FLOPs, relative to dense training")
        axis.set_ylabel(f"test {judged.title}")
        axis.grid(alpha=0.3)
    handles = [
        Line2D([], [], color=kind.colour, marker=kind.marker, linestyle="", label=kind.label)
        for kind in kinds
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=9)
    figure.suptitle(title, fontsize=12)
    figure.savefig(path, **SAVE)


def _set_limits(
    axis: Axes, here: Sequence[dict[str, Any]], without: Sequence[dict[str, Any]]
) -> None:
    """Makes room for the points, the levels and the names beside the points."""
    costs = [record["training_flops"] for record in here]
    axis.set_xscale("log")
    axis.set_xlim(0.85 * min(costs), 3.2 * max(costs))
    shown = [record["mean"] for record in (*here, *without)]
    margin = 0.06 * (max(shown) - min(shown)) or 1.0
    axis.set_ylim(min(shown) - 2 * margin, max(shown) + 2 * margin)


def _draw_level(axis: Axes, record: dict[str, Any]) -> None:
    """Draws the score of a method that has no sparsity as a line across the panel."""
    axis.axhline(record["mean"], color="#000000", linestyle=":", linewidth=1)
    axis.annotate(
        f"{styles.of(record['method']).name} (100 %)",
        (1, record["mean"]),
        (-4, 4),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        fontsize=8,
        ha="right",
    )


def _draw_points(axis: Axes, here: Sequence[dict[str, Any]]) -> None:
    """Draws a point with its name for each method, and a bar for the spread over its seeds."""
    costs, means = ([record[key] for record in here] for key in ("training_flops", "mean"))
    shown = [styles.of(record["method"]) for record in here]
    offsets = _apart(axis, costs, means, [style.name for style in shown])
    for record, style, offset in zip(here, shown, offsets, strict=True):
        colour, at = style.kind.colour, (record["training_flops"], record["mean"])
        axis.errorbar(
            *at,
            record["std"],  # None for one seed: no bar
            fmt=style.kind.marker,
            markersize=5,
            color=colour,
            elinewidth=0.7,
            capsize=2,
        )
        axis.annotate(
            style.name,
            at,
            offset,
            textcoords="offset points",
            fontsize=8,
            va="center",
            color=colour,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.4, "shrinkB": 3},
        )


def _apart(
    axis: Axes, costs: Sequence[float], heights: Sequence[float], names: Sequence[str]
) -> list[tuple[float, float]]:
    """Computes offsets, in points, that keep the names beside their points from overlapping.

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
    panels: Mapping[float, Sequence[Connections]], title: str, path: pathlib.Path
) -> None:
    """Draws heat maps of the connections that each pixel has to the first layer.

    Args:
      panels: The methods at each sparsity; a row each, before and after training side by side.
      title: Stands above the figure.
      path: The PNG to write.
    """
    rows = [(sparsity, maps) for sparsity, several in panels.items() for maps in several]
    figure = Figure(figsize=(7.2, 3.3 * len(rows) + 0.5), layout="constrained")
    axes = figure.subplots(len(rows), 2, squeeze=False)
    for sparsity, several in panels.items():
        own = [row for row, (s, _) in zip(axes, rows, strict=True) if s == sparsity]
        highest = max(int(m.max()) for maps in several for m in (maps.before, maps.after))
        for row, maps in zip(own, several, strict=True):
            name = styles.of(maps.method).name
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
    """Limits the axis to values after the first tenth: the start would squash the rest."""
    late = [getattr(c, kind)[:, c.steps >= c.steps[-1] / 10] for c in curves]
    low, high = min(float(x.min()) for x in late), max(float(x.max()) for x in late)
    margin = 0.05 * (high - low) or 0.01
    axis.set_ylim(low - margin, high + margin)
