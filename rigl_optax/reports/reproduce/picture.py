"""Draws a claim: scores and paired differences against sparsity, or differences of many arms."""

import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rigl_optax.reports import figures, styles
from rigl_optax.reports.reproduce import page
from rigl_optax.reports.reproduce.claims import Experiment
from rigl_optax.reports.reproduce.trials import Found
from rigl_optax.training import score

_MARKERS = {"dense": "s", "small_dense": "D", "static": "o", "set": "^", "rigl": "P", "gmp": "v"}


def draw(found: Mapping[Experiment, Found], path: pathlib.Path) -> None:
    """Draws the runs, a column of panels for each experiment.

    Where arms differ in their method only: the score and, below, the difference to the baseline,
    against the sparsity. Else: the paired difference of each arm, a panel for each sparsity.

    Args:
      found: The runs of each experiment.
      path: The PNG to write.
    """
    each = {experiment: page.rows(experiment, one) for experiment, one in found.items()}
    if any(row["arm"].name or row["arm"].steps for rows in each.values() for row in rows):
        figure = _differences(each)
    else:
        figure = _against_sparsity(each)
    figure.suptitle("means over seeds; bars: one standard deviation", fontsize=9)
    figure.savefig(path, **figures.SAVE)


def _against_sparsity(each: Mapping[Experiment, list[dict[str, Any]]]) -> Figure:
    figure = Figure(figsize=(5.2 * len(each), 6.6), layout="constrained")
    columns = figure.subplots(2, len(each), squeeze=False, height_ratios=(3, 2)).T
    for (experiment, rows), (above, below) in zip(each.items(), columns, strict=True):
        judged = score.of(rows[0], "test_")
        parts = sorted({row["sparsity"] for row in rows if row["sparsity"] is not None})
        for method in dict.fromkeys(row["method"] for row in rows):
            own = [row for row in rows if row["method"] == method]
            _plot(above, own, parts, [row["mean"] for row in own], [row["std"] for row in own])
            paired = [row for row in own if row.get("difference")]
            means = [statistics.mean(row["difference"]) for row in paired]
            _plot(below, paired, parts, means, [_spread(row["difference"]) for row in paired])
        compared_with = styles.of(experiment.baseline(experiment.arms[0])[0])
        below.axhline(0, color=compared_with.colour, linestyle="--", linewidth=1)
        above.set_title(experiment.title.replace(", ", ",\n", 1), fontsize=10)
        above.set_ylabel(f"test {judged.title}")
        below.set_ylabel(f"minus {page.baseline_name(experiment)} (points)")
        below.set_xlabel("sparsity (% of weights that are zero)")
        for axis in (above, below):
            axis.set_xticks(range(len(parts)), [f"{100 * part:g}" for part in parts])
            axis.grid(alpha=0.3)
    columns[0][0].legend(loc="lower left", fontsize=9)
    return figure


def _plot(
    axis: Axes,
    rows: Sequence[dict[str, Any]],
    parts: Sequence[float],
    means: Sequence[float],
    spreads: Sequence[float | None],
) -> None:
    """Draws one method: a line with bars of one standard deviation; a level without a sparsity."""
    if not rows:
        return
    name, _, colour, line = styles.of(rows[0]["method"])
    if rows[0]["sparsity"] is None:
        axis.axhline(means[0], color=colour, linestyle=line, label=name)
        return
    axis.errorbar(
        [parts.index(row["sparsity"]) for row in rows],
        means,
        [0.0 if spread is None else spread for spread in spreads],
        color=colour,
        linestyle=line,
        marker=_MARKERS.get(rows[0]["method"], "o"),
        markersize=5,
        capsize=2,
        label=name,
    )


def _differences(each: Mapping[Experiment, list[dict[str, Any]]]) -> Figure:
    panels = [
        (experiment, part, [row for row in rows if row["sparsity"] == part])
        for experiment, rows in each.items()
        for part in sorted({row["sparsity"] for row in rows})
    ]
    most = max(len(rows) for _, _, rows in panels)
    size = (5.2 * len(panels), 1.2 + 0.3 * most)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for (experiment, part, rows), axis in zip(panels, axes, strict=True):
        shown = [row for row in rows if row.get("difference")][::-1]
        for place, row in enumerate(shown):
            style = styles.of(row["method"])
            axis.errorbar(
                statistics.mean(row["difference"]),
                place,
                xerr=_spread(row["difference"]),
                color=style.colour,
                marker=_MARKERS.get(row["method"], "o"),
                capsize=2,
            )
        axis.set_yticks(range(len(shown)), [page.label(row["arm"]) for row in shown])
        axis.axvline(0, color="#000000", linewidth=1)
        judged = score.of(rows[0], "test_")
        baseline = page.baseline_name(experiment)
        axis.set_xlabel(f"test {judged.label} minus {baseline} (points)")
        axis.set_title(f"{experiment.task}, {100 * part:g} % sparse", fontsize=10)
        axis.grid(alpha=0.3)
    return figure


def _spread(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None
