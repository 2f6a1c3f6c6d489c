"""Collects what the figures of a comparison show: learning curves, connections of pixels."""

import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from rigl_optax.reports import comparison, figures, pixels
from rigl_optax.reports.comparison import Arm, Results
from rigl_optax.training import checkpoints, loading, score, setup
from rigl_optax.training import config as config_lib


def curves(results: Results) -> dict[float, list[figures.Curve]]:
    """Collects validation curves: `{sparsity: curves}`.

    Arms without a sparsity are at each. Arms in `without_curves` or with fewer steps are left out,
    and so are sparsities at which nothing is left.
    """
    left_out = [*without_curves(results), *(arm for arm in results if arm.steps is not None)]
    panels: dict[float, list[figures.Curve]] = {}
    for part in sorted({arm.sparsity for arm in results if arm.sparsity is not None}):
        chosen = {a: r for a, r in results.items() if r and a not in left_out}
        if any(arm.sparsity == part for arm in chosen):
            panels[part] = [
                _curve(arm, found) for arm, found in chosen.items() if arm.sparsity in (None, part)
            ]
    return panels


def without_curves(results: Results) -> list[Arm]:
    """Lists the arms that cannot be drawn.

    Their records hold no curves, or their seeds were evaluated at different steps.
    """
    found = []
    for arm, each in results.items():
        steps = {tuple(m["step"] for m in result.get("curve", ())) for result in each}
        if each and (len(steps) > 1 or steps == {()}):
            found.append(arm)
    return found


def _curve(arm: Arm, found: list[dict[str, Any]]) -> figures.Curve:
    """Stacks the curves of the seeds of one arm."""
    judged = score.of(found[0]["test"])
    seeds = [[(m["step"], judged.value(m), m["loss"]) for m in result["curve"]] for result in found]
    steps, values, loss = np.moveaxis(np.array(seeds), -1, 0)
    return figures.Curve(arm.label, steps[0], values, loss)


def connections(
    base: config_lib.Config,
    compared: Sequence[Arm],
    workdir: pathlib.Path,
    say: Callable[[str], None] = print,
) -> dict[float, list[figures.Connections]]:
    """Counts live connections of each input pixel before and after training, for the first seed.

    A network whose last checkpoint is not there is left out: its result may be a record from
    elsewhere. No file is changed, so runs may be training meanwhile.

    Args:
      base: The config of the comparison, of a fully connected network.
      compared: The masked arms to show; their runs have finished.
      workdir: The workdir of the comparison.
      say: Called with a line for each network that is left out.

    Returns:
      `{sparsity: maps}`.
    """
    panels: dict[float, list[figures.Connections]] = {}
    for arm, config, folder in comparison.runs(base, compared, 1, workdir):
        if arm.sparsity is None:
            continue
        run = first = final = None
        if (folder / "checkpoints").exists():
            run = setup.prepare(config)
            with checkpoints.read_checkpoints(folder) as saved:
                final = checkpoints.restore_newest(saved, run.abstract, say, config)
                first = loading.first(run, saved, say)
        if run is None or final is None or int(final.step) != config.steps:
            say(
                f"{folder}: no checkpoint of step {config.steps}, left out of the picture of inputs"
            )
            continue
        before, after = (
            _input_connections(run.representation.weight_masks(state), run.task.image_shape)
            for state in (first, final)
        )
        panels.setdefault(arm.sparsity, []).append(figures.Connections(arm.method, before, after))
    return panels


def _input_connections(masks: Any, image_shape: tuple[int, ...]) -> np.ndarray:
    """Counts active weights of each pixel in the first layer that reads the pixels."""
    kernels = [m for m in jax.tree.leaves(masks) if pixels.reads_pixels(m, image_shape)]
    return pixels.connections(kernels[0], image_shape)
