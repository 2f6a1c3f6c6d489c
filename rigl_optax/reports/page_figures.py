"""Chooses the curves, layers and masks that the page of a run shows."""

import pathlib
from typing import Any, NamedTuple

import numpy as np

from rigl_optax import _paths
from rigl_optax.reports import charts, pixels
from rigl_optax.reports.charts import Line, Record
from rigl_optax.training import checkpoints, loading, methods, setup, stacks
from rigl_optax.training.config import Config

SHOWN_LAYERS = len(charts.COLOURS)  # readers could not tell more of them apart

_PARTS = (  # of transformers
    (
        "dead_heads",
        "Dead heads",
        "dead heads",
        "Heads of attention none of whose features has active weights both into its value and out "
        "of it: nothing passes.",
    ),
    (
        "averaging_heads",
        "Averaging heads",
        "averaging heads",
        "Heads whose queries and keys have no feature in common: they take the mean of the values.",
    ),
    (
        "dead_units",
        "Dead hidden units",
        "dead units of an MLP",
        "Hidden units of an MLP without inputs (or inputs of their gate), or that are not read.",
    ),
)


class Figure(NamedTuple):
    """One figure.

    Attributes:
      name: Its id in the page.
      note: The caption, or the reason why there is no picture.
      svg: The picture; may be empty.
    """

    name: str
    note: str
    svg: str


def training(records: list[Record]) -> list[Figure]:
    """Draws loss and accuracy."""
    parts = ("validation", "train")
    loss = [Line(kind, kind, "loss") for kind in parts]
    accuracy = [Line(kind, kind, "accuracy", 100) for kind in parts]
    svgs = {
        "loss": charts.curves("loss", "Loss", "loss (nats)", loss, records, log=True),
        "accuracy": charts.curves("accuracy", "Accuracy", "accuracy (%)", accuracy, records),
    }
    note = "Training values are means over the batches since the record before."
    return [
        Figure(name, note if svg else f"No {name} is recorded yet.", svg)
        for name, svg in svgs.items()
    ]


def topology(records: list[Record]) -> list[Figure]:
    """Draws what the rewirings changed."""
    rewirings = [record for record in records if record["kind"] == "rewiring"]
    if not rewirings:
        return [Figure("churn", "No rewiring is recorded.", "")]

    def percent(*names: str) -> list[Line]:
        return [Line(name, "rewiring", name, 100) for name in names]

    def curves(name: str, title: str, unit: str, lines: list[Line], note: str) -> Figure:
        return Figure(name, note, charts.curves(name, title, unit, lines, rewirings))

    return [
        curves(
            "churn",
            "Churn and survival",
            "weights (%)",
            percent("churn", "survival"),
            "Churn: active weights that the rewiring replaced. Survival: weights grown by the "
            "rewiring before, that this one kept.",
        ),
        curves(
            "coverage",
            "Coverage and overlap",
            "weights (%)",
            percent("coverage", "overlap"),
            "Coverage: weights of the sparse layers that have ever been active. Overlap: weights "
            "active at step 0 that are active now.",
        ),
        curves(
            "dead-inputs",
            "Dead inputs",
            "dead inputs (units)",
            _most("dead_inputs", rewirings),
            "Inputs of a layer with no active weight out of them; after the first layer these are "
            "hidden units without effect.",
        ),
        curves(
            "dead-outputs",
            "Dead outputs",
            "dead outputs (units)",
            _most("dead_outputs", rewirings),
            "Output units of a layer with no active weight into them: they are constant.",
        ),
        *(
            curves(name.replace("_", "-"), title, unit, _most(name, rewirings), note)
            for name, title, unit, note in _PARTS
            if any(key.startswith(f"{name}/") for key in rewirings[-1])
        ),
    ]


def _most(quantity: str, rewirings: list[Record]) -> list[Line]:
    """Chooses the layers where a quantity was largest, in the model's order."""
    keys = [key for key in rewirings[-1] if key.startswith(f"{quantity}/")]
    largest = sorted(keys, key=lambda key: -max(r.get(key, 0) for r in rewirings))[:SHOWN_LAYERS]
    return [Line(k.removeprefix(f"{quantity}/"), "rewiring", k) for k in keys if k in largest]


def masks(workdir: pathlib.Path, config: Config, which: str = loading.NEWEST) -> list[Figure]:
    """Draws the first sparse layer's mask at step 0 and in a checkpoint.

    Where the layer has a row for each value of an input image, it also draws the connections of
    each pixel.

    Args:
      workdir: The workdir of the run.
      config: The config of the run.
      which: The checkpoint, as in `rigl_optax.training.load`.

    Raises:
      ValueError: If a checkpoint other than the newest is asked for and cannot be read.
    """
    if not methods.find(config).masked:
        return []
    if (workdir / "checkpoints").exists():  # refuses another run's config before using it
        with checkpoints.read_checkpoints(workdir) as saved:
            checkpoints.check_newest(saved, config)
    run = loading.read_run(workdir)
    try:
        with checkpoints.read_checkpoints(workdir) as saved:
            first = _masks(run, loading.first(run, saved, lambda _: None))
    except FileNotFoundError as error:  # masks that are chosen by data which are not there
        return [Figure("mask", f"No pictures of masks: {error}", "")]
    path = next((p for p, mask in first.items() if mask.ndim >= 2 and not mask.all()), None)
    if path is None:
        return []
    before, after, note = first[path], None, "No checkpoint yet."
    if (workdir / "checkpoints").exists() or which != loading.NEWEST:
        try:
            state = loading.restore(run, workdir, which, lambda _: None)
            after, note = (
                _masks(run, state)[path],
                f"Now: the checkpoint of step {int(state.step):,}.",
            )
        except ValueError as error:
            if which != loading.NEWEST:
                raise
            note = str(error)  # none can be read, or the newest replaced the others just now
    svg = charts.mask_pictures("mask", path, before, after)
    found = [Figure("mask", f"Black: active. {note}", svg)]
    if pixels.reads_pixels(before, run.task.image_shape):
        now = None if after is None else pixels.connections(after, run.task.image_shape)
        first_counts = pixels.connections(before, run.task.image_shape)
        svg = charts.pixel_pictures("pixels", first_counts, now)
        found.append(Figure("pixels", f"Active weights of {path} at each input pixel. {note}", svg))
    return found


def _masks(run: setup.Run, state: Any) -> dict[str, np.ndarray]:
    """Returns the masks of single weights by path, on the host; of a stack of layers the first."""
    masks = _paths.flatten_with_paths(run.representation.weight_masks(state))
    stacked = stacks.paths(run)
    first = [(f"{path}/0", mask[0]) if path in stacked else (path, mask) for path, mask in masks]
    return {path: np.asarray(mask) for path, mask in first}
