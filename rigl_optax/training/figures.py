"""Pictures of a comparison: learning curves, and where the input connections go."""

import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe and Ito's colours: told apart by colour-blind readers; styles help in print.
STYLES = {
    "dense": ("#000000", ":"),
    "static": ("#E69F00", "--"),
    "set": ("#009E73", "-."),
    "rigl": ("#0072B2", "-"),
}
NAMES = {"dense": "dense", "static": "static", "set": "SET", "rigl": "RigL"}
OTHER = ("#CC79A7", "-")
SAVE: dict[str, Any] = {
    "dpi": 150,
    "metadata": {"Software": f"matplotlib {matplotlib.__version__}"},
}


class Curve(NamedTuple):
    """One method's validation metrics.

    Attributes:
      method: Its name.
      steps: (points,) training steps.
      accuracy: (seeds, points) in percent.
      loss: (seeds, points) in nats.
    """

    method: str
    steps: np.ndarray
    accuracy: np.ndarray
    loss: np.ndarray


def learning_curves(panels: dict[float, Sequence[Curve]], title: str, path: pathlib.Path) -> None:
    """Validation accuracy and loss against the step: mean over seeds, and a band from min to max.

    Args:
      panels: Curves at each sparsity; a row of two panels each.
      title: Above all.
      path: The PNG to write.
    """
    figure = Figure(figsize=(10, 3.9 * len(panels) + 0.4), layout="constrained")
    axes = figure.subplots(len(panels), 2, squeeze=False)
    for row, (sparsity, curves) in zip(axes, panels.items(), strict=True):
        for axis, kind, unit in zip(row, ("accuracy", "loss"), ("%", "nats"), strict=True):
            for curve in curves:
                colour, line = STYLES.get(curve.method, OTHER)
                values = getattr(curve, kind)
                name = NAMES.get(curve.method, curve.method)
                axis.plot(curve.steps, values.mean(0), line, color=colour, label=name)
                band = (values.min(0), values.max(0))
                axis.fill_between(curve.steps, *band, color=colour, alpha=0.15, linewidth=0)
            axis.set_title(f"Validation {kind}, {100 * sparsity:g} % sparse", fontsize=11)
            axis.set_xlabel("training step")
            axis.set_ylabel(f"{kind} ({unit})")
            axis.grid(alpha=0.3)
            _fit(axis, curves, kind)
        row[0].legend(loc="lower right", frameon=True)
    figure.suptitle(title, fontsize=12)
    figure.savefig(path, **SAVE)


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
