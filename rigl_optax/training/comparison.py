"""Several methods, sparsities and seeds against each other; each run on disk by itself."""

import dataclasses
import json
import math
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.console import Console
from rich.progress import track

import rigl_optax
from rigl_optax.training import checkpoints, figures, loop, methods, metrics, setup
from rigl_optax.training import config as config_lib

LOG_FILE = "log.txt"


class Arm(NamedTuple):
    """One line of the table: a method at a sparsity (None: a method without masks)."""

    method: str
    sparsity: float | None

    @property
    def folder(self) -> str:
        """Its folder below the workdir."""
        return self.method if self.sparsity is None else f"{self.method}-{self.sparsity}"


Results = dict[Arm, list[dict[str, Any]]]  # of each seed, in order


def arms(names: Sequence[str], sparsities: Sequence[float]) -> list[Arm]:
    """Every method at every sparsity, those without masks once, in front.

    Raises:
      ValueError: If there is no method of a name; it lists those there are.
    """
    for name in names:
        if name not in methods.METHODS:
            raise ValueError(f"method {name!r}: methods are {', '.join(methods.METHODS)}")
    unmasked = [Arm(name, None) for name in names if not methods.METHODS[name].masked]
    masked = [name for name in names if methods.METHODS[name].masked]
    return unmasked + [Arm(name, sparsity) for sparsity in sparsities for name in masked]


def runs(
    base: config_lib.Config, compared: Sequence[Arm], seeds: int, workdir: pathlib.Path
) -> Iterator[tuple[Arm, config_lib.Config, pathlib.Path]]:
    """The config and folder of every run, seed by seed, so that an early stop is balanced."""
    for seed in range(seeds):
        for arm in compared:
            config = dataclasses.replace(base, method=arm.method, seed=base.seed + seed)
            if arm.sparsity is not None:
                config = dataclasses.replace(config, sparsity=arm.sparsity)
            yield arm, config, workdir / arm.folder / f"seed{config.seed}"


def run_all(
    base: config_lib.Config,
    compared: Sequence[Arm],
    seeds: int,
    workdir: pathlib.Path,
    console: Console,
) -> Results:
    """Trains what is not yet finished, and reads what is.

    Args:
      base: The config; method, sparsity and seed are replaced.
      compared: From `arms`.
      seeds: Runs of each arm, with the base's seed and those after it. All arms of a seed have
        the same initial weights and the same batches, and the same initial masks.
      workdir: Gets a folder for each run. One that has finished is not run again.
      console: Told about each run as it ends.

    Returns:
      `result.json` of all runs.
    """
    todo = list(runs(base, compared, seeds, workdir))
    results: Results = {arm: [] for arm in compared}
    shown = track(todo, "runs", console=console, disable=not console.is_terminal)
    for number, (arm, config, folder) in enumerate(shown, start=1):
        result = _finished(folder, config) or _train(config, folder)
        results[arm].append(result)
        label = arm.method + ("" if arm.sparsity is None else f" {arm.sparsity:g}")
        console.print(
            f"[{number}/{len(todo)}] {label:12} seed {config.seed}: "
            f"test accuracy {100 * result['test']['accuracy']:.2f} %",
            markup=False,
        )
        for warning in result["warnings"]:
            console.print(f"  warning: {warning}", markup=False)
    return results


def _finished(folder: pathlib.Path, config: config_lib.Config) -> dict[str, Any] | None:
    path = folder / loop.RESULT_FILE
    if not path.exists():
        return None
    result = json.loads(path.read_text())
    changed = config_lib.differences(result["config"], config)
    if changed:
        raise ValueError(
            f"{folder} holds a finished run of another config ({'; '.join(changed)}); give "
            "another workdir, or delete it"
        )
    return result


def _train(config: config_lib.Config, folder: pathlib.Path) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOG_FILE).open("a") as file:
        return loop.train(config, folder, Console(file=file, width=120, highlight=False))


def curves(results: Results, workdir: pathlib.Path) -> dict[float, list[figures.Curve]]:
    """Validation curves of all methods at each sparsity; those without masks are in each."""
    panels: dict[float, list[figures.Curve]] = {}
    for sparsity in sorted({arm.sparsity for arm in results if arm.sparsity is not None}):
        chosen = {a: found for a, found in results.items() if a.sparsity in (None, sparsity)}
        panels[sparsity] = [_curve(arm, found, workdir) for arm, found in chosen.items()]
    return panels


def _curve(arm: Arm, found: list[dict[str, Any]], workdir: pathlib.Path) -> figures.Curve:
    seeds = []
    for result in found:
        folder = workdir / arm.folder / f"seed{result['config']['seed']}"
        records = [r for r in metrics.read(folder / metrics.FILE) if r["kind"] == "validation"]
        seeds.append([(r["step"], 100 * r["accuracy"], r["loss"]) for r in records])
    steps, accuracy, loss = np.moveaxis(np.array(seeds), -1, 0)
    return figures.Curve(arm.method, steps[0], accuracy, loss)


def connections(
    base: config_lib.Config, compared: Sequence[Arm], workdir: pathlib.Path
) -> dict[float, list[figures.Connections]]:
    """Live connections of each input pixel before and after training, of the first seed's networks.

    Args:
      base: The config of the comparison, of a fully connected network.
      compared: The masked arms to look at; their runs have finished.
      workdir: Of the comparison.

    Returns:
      `{sparsity: maps}`.
    """
    panels: dict[float, list[figures.Connections]] = {}
    for arm, config, folder in runs(base, compared, 1, workdir):
        if arm.sparsity is None:
            continue
        run = setup.prepare(config)
        with checkpoints.open_checkpoints(folder, config.keep_checkpoints) as saved:
            final = checkpoints.restore_newest(saved, run.initial, print)
        before, after = (
            _input_connections(rigl_optax.get_masks(state.opt_state), run.image_shape)
            for state in (run.initial, final or run.initial)
        )
        panels.setdefault(arm.sparsity, []).append(figures.Connections(arm.method, before, after))
    return panels


def _input_connections(masks: Any, image_shape: tuple[int, ...]) -> np.ndarray:
    """Active weights of each pixel in the first kernel that has a row for each."""
    pixels = math.prod(image_shape)
    kernels = [m for m in jax.tree.leaves(masks) if m.ndim == 2 and m.shape[0] == pixels]
    return np.asarray(kernels[0]).sum(1).reshape(image_shape)
