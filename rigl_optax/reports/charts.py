"""Draws a run as inline SVG: curves against steps and FLOPs, and pictures of masks."""

import io
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

# Okabe and Ito's colours, which colour-blind readers can tell apart; dashes help in print.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", "--", "-.", ":", "-", "--", "-.")
LARGEST = 400  # cells along a side of a mask's picture; larger masks are averaged

Record = dict[str, Any]


class Line(NamedTuple):
    """One quantity of one kind of record.

    Attributes:
      label: Its name in the legend.
      kind: The kind of record that has it.
      key: Its name in the record.
      scale: A factor for its values: 100 for percent.
    """

    label: str
    kind: str
    key: str
    scale: float = 1.0


def curves(
    name: str,
    title: str,
    unit: str,
    lines: Sequence[Line],
    records: list[Record],
    *,
    log: bool = False,
) -> str:
    """Draws curves against the step and, beside them, against the training FLOPs spent.

    Args:
      name: Unique in the page: the ids in the chart start with it.
      title: Stands above the chart.
      unit: Label of the vertical axis, with its unit.
      lines: What to draw; those without records are left out.
      records: From `metrics.read`.
      log: Whether the vertical axis is logarithmic.

    Returns:
      An `<svg>` element; empty if there is nothing to draw.
    """
    found = [line for line in lines if _points(line, records, "step")[0]]
    if not found:
        return ""
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, against, label in zip(
        axes, ("step", "training_flops"), ("training step", "training FLOPs"), strict=True
    ):
        for number, line in enumerate(found):
            _plot(axis, number, line, _points(line, records, against))
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    axes[0].xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes[1].xaxis.set_major_formatter(EngFormatter())
    axes[0].set_ylabel(unit)
    if log and any(y > 0 for line in found for y in _points(line, records, "step")[1]):
        axes[0].set_yscale("log")
    handles = axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=4, fontsize=9, frameon=False)
    figure.suptitle(title, fontsize=12)
    return _svg(figure, name)


def mask_pictures(name: str, path: str, before: np.ndarray, after: np.ndarray | None) -> str:
    """Draws the active weights of one layer at step 0 and now; columns are output units.

    Args:
      name: As in `curves`.
      path: Of the layer.
      before: The mask at step 0, bool (..., units).
      after: The mask now; None if it is not known.
    """
    pictures = [("at step 0", before)] + ([("now", after)] if after is not None else [])
    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.subplots(1, 2)
    axes[1].set_visible(after is not None)
    for axis, (when, mask) in zip(axes, pictures, strict=False):
        rows = mask.reshape(-1, mask.shape[-1])
        axis.imshow(
            1 - _averaged(rows),
            cmap="gray",
            vmin=0,
            vmax=1,
            aspect="auto",
            interpolation="nearest",
            extent=(0, rows.shape[1], rows.shape[0], 0),
        )
        axis.set_title(f"{_plain(path)} {when}: {int(rows.sum()):,} of {rows.size:,}", fontsize=10)
        axis.set_xlabel("output unit")
    axes[0].set_ylabel("input" if before.ndim == 2 else "input and place in the window")
    return _svg(figure, name)


def pixel_pictures(name: str, before: np.ndarray, after: np.ndarray | None) -> str:
    """Draws the live connections of each input pixel at step 0 and now.

    Args:
      name: As in `curves`.
      before: Connections at step 0, int (height, width).
      after: Connections now; None if they are not known.
    """
    pictures = [("at step 0", before)] + ([("now", after)] if after is not None else [])
    highest = max(int(counts.max()) for _, counts in pictures)
    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.subplots(1, 2)
    axes[1].set_visible(after is not None)
    for axis, (when, counts) in zip(axes, pictures, strict=False):
        image = axis.imshow(counts, vmin=0, vmax=highest, cmap="cividis", interpolation="nearest")
        dead = int((counts == 0).sum())
        axis.set_title(f"{when}: {dead} of {counts.size} pixels unused", fontsize=10)
        axis.set_xlabel("pixel column")
        axis.set_ylabel("pixel row")
        for ticks in (axis.xaxis, axis.yaxis):
            ticks.set_major_locator(MaxNLocator(6, integer=True))
    figure.colorbar(image, ax=list(axes), label="live connections of the pixel")
    return _svg(figure, name)


def _points(line: Line, records: list[Record], against: str) -> tuple[list[float], list[float]]:
    """Reads the points (x, y) of a line from the records that have them."""
    found = [r for r in records if r["kind"] == line.kind and line.key in r and against in r]
    return [r[against] for r in found], [line.scale * r[line.key] for r in found]


def _plot(axis: Axes, number: int, line: Line, points: tuple[list[float], list[float]]) -> None:
    # A single record is a point, and a line through it would not be seen.
    marker = "o" if len(points[0]) < 40 else ""
    colour, dash = COLOURS[number % len(COLOURS)], DASHES[number % len(DASHES)]
    label = " " + _plain(line.label)  # one that begins with an underscore would be left out
    axis.plot(*points, dash, color=colour, marker=marker, markersize=3, label=label)


def _plain(text: str) -> str:
    """Escapes dollars, between which Matplotlib would typeset mathematics."""
    return text.replace("$", r"\$")


def _averaged(mask: np.ndarray) -> np.ndarray:
    """Averages a mask over blocks, at most `LARGEST` by `LARGEST` of them: densities in [0, 1]."""
    rows, columns = (-(-length // LARGEST) for length in mask.shape)
    padding = [(0, -mask.shape[0] % rows), (0, -mask.shape[1] % columns)]
    weights = np.pad(np.ones(mask.shape, np.float32), padding)
    blocks = [
        np.pad(x.astype(np.float32), p)
        .reshape(weights.shape[0] // rows, rows, weights.shape[1] // columns, columns)
        .sum((1, 3))
        for x, p in ((mask, padding), (weights, [(0, 0), (0, 0)]))
    ]
    return blocks[0] / blocks[1]


def _svg(figure: Figure, name: str) -> str:
    """Renders a figure as an element of an HTML page; text stays text."""
    stream = io.StringIO()
    options: Any = {"svg.fonttype": "none", "svg.hashsalt": name, "font.family": "sans-serif"}
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context(options):
        figure.savefig(stream, format="svg", metadata=nothing)
    text = stream.getvalue()
    svg = text[text.index("<svg") :]
    # Matplotlib gives the parts of every figure the same ids, and a page may have each once.
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'href="#', f'href="#{name}-', svg)
    svg = re.sub(r"url\(#", f"url(#{name}-", svg)
    return svg.replace("<svg ", '<svg role="img" ', 1)
