"""Several methods, sparsities and seeds against each other; each run on disk by itself."""

import math
import pathlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.console import Console
from rich.progress import track

from rigl_optax.training import (
    checkpoints,
    figures,
    files,
    loop,
    methods,
    recovery,
    score,
    setup,
    sparsity,
)
from rigl_optax.training import config as config_lib

LOG_FILE = "log.txt"
FAILED_FILE = "failed.json"
TICKETS = "rigl"  # the method whose final masks are lottery tickets


class Arm(NamedTuple):
    """One line of the table: a method at a sparsity (None: one to which it means nothing).

    Its structure is that of all layers; by default weights are single.
    """

    method: str
    sparsity: float | None
    structure: config_lib.Structure = config_lib.Structure()

    @property
    def folder(self) -> str:
        """Its folder below the workdir."""
        parts = [self.method, "" if self.sparsity is None else str(self.sparsity)]
        parts += re.findall(r"\w+", sparsity.describe(self.structure))
        return "-".join(filter(None, parts))

    @property
    def label(self) -> str:
        """The method and its structure, for people."""
        return f"{self.method} {sparsity.describe(self.structure)}".rstrip()


# Of a run's result, what is kept in a repository.
RECORDED = (
    "config",
    "validation",
    "test",
    "active_weights",
    "weights",
    "flops",
    "coverage",
    "curve",
    "warnings",
)
Results = dict[Arm, list[dict[str, Any]]]  # of each seed, in order


def arms(
    names: Sequence[str],
    sparsities: Sequence[float],
    structures: Sequence[config_lib.Structure] = (config_lib.Structure(),),
) -> list[Arm]:
    """Every method at every sparsity, those to which it means nothing once, in front.

    Args:
      names: Of methods.
      sparsities: In [0, 1).
      structures: As in `config.method.structure`; a method that takes none is compared without.

    Raises:
      ValueError: If there is no method of a name; it lists those there are.
    """
    for name in names:
        if name not in methods.METHODS:
            raise ValueError(f"method {name!r}: methods are {', '.join(methods.METHODS)}")
    found = {name: methods.METHODS[name] for name in names}
    sparse = [name for name, method in found.items() if method.masked or method.narrow]
    return [Arm(name, None) for name in names if name not in sparse] + [
        Arm(name, part, structure)
        for part in sparsities
        for structure in structures
        for name in sparse
        if structure == config_lib.Structure() or methods.takes_structure(found[name])
    ]


def runs(
    base: config_lib.Config, compared: Sequence[Arm], seeds: int, workdir: pathlib.Path
) -> Iterator[tuple[Arm, config_lib.Config, pathlib.Path]]:
    """The config and folder of every run, seed by seed, so that an early stop is balanced."""
    for seed in range(seeds):
        for arm in compared:
            config = config_lib.changed(base, {"method.name": arm.method, "seed": base.seed + seed})
            if arm.sparsity is not None:
                changes = {"method.sparsity": arm.sparsity, "method.structure": arm.structure}
                config = config_lib.changed(config, changes | {"method.condensed": False})
                is_stored = base.method.condensed and methods.can_be_stored(config)
                config = config_lib.changed(config, {"method.condensed": is_stored})
            else:
                config = config_lib.changed(
                    config,
                    {"method.structure": config_lib.Structure(), "method.condensed": False},
                )
            if methods.find(config).start == "ticket":
                ticket = (
                    workdir
                    / Arm(TICKETS, arm.sparsity, arm.structure).folder
                    / f"seed{config.seed}"
                )
                config = config_lib.changed(config, {"method.ticket": str(ticket)})
            yield arm, config, workdir / arm.folder / f"seed{config.seed}"


def run_all(
    base: config_lib.Config,
    compared: Sequence[Arm],
    seeds: int,
    workdir: pathlib.Path,
    console: Console,
    records: pathlib.Path | None = None,
    train: bool = True,
) -> Results:
    """Trains what is not yet finished, and reads what is.

    Args:
      base: The config; method, sparsity, structure and seed are replaced. `condensed` stands for
        stored blocks where there can be some.
      compared: From `arms`.
      seeds: Runs of each arm, with the base's seed and those after it. All arms of a seed have
        the same initial weights and the same batches, and the same initial masks.
      workdir: Gets a folder for each run. One that has finished is not run again; nor is one whose
        losses or weights became non-finite: it leaves `failed.json`, and the others go on.
      console: Told about each run as it ends.
      records: Gets a small JSON for each run, to be kept. What is there is not run again either,
        unless it is the ticket of another run.
      train: Whether to train what is missing, or leave it out.

    Returns:
      `result.json` of all runs that have one.

    Raises:
      StoppedError: If the process was asked to stop: the run at hand is saved, and the same
        command goes on.
    """
    todo = list(runs(base, compared, seeds, workdir))
    results: Results = {arm: [] for arm in compared}
    shown = track(todo, "runs", console=console, disable=not console.is_terminal)
    for number, (arm, config, folder) in enumerate(shown, start=1):
        record = None if records is None else records / f"{arm.folder}-seed{config.seed}.json"
        result = _recorded(record, config) or _finished(folder, config)
        if result is None:
            if not train:
                continue
            result = _trained(config, folder, console)
            if result is None:
                continue
        if record is not None and not record.exists():
            record.parent.mkdir(parents=True, exist_ok=True)
            files.write(record, {key: result[key] for key in RECORDED if key in result})
        results[arm].append(result)
        label = arm.label + ("" if arm.sparsity is None else f" {arm.sparsity:g}")
        console.print(
            f"[{number}/{len(todo)}] {label:12} seed {config.seed}: "
            f"test {score.of(result['test']).text(result['test'])}",
            markup=False,
        )
        for warning in result["warnings"]:
            console.print(f"  warning: {warning}", markup=False)
    return results


def failures(
    base: config_lib.Config, compared: Sequence[Arm], seeds: int, workdir: pathlib.Path
) -> dict[Arm, list[int]]:
    """Seeds of the runs that ended without a result, by arm; arguments as in `run_all`."""
    failed: dict[Arm, list[int]] = {}
    for arm, config, folder in runs(base, compared, seeds, workdir):
        if _failed(folder, config) is not None:
            failed.setdefault(arm, []).append(config.seed)
    return failed


def _trained(
    config: config_lib.Config, folder: pathlib.Path, console: Console
) -> dict[str, Any] | None:
    """The result of a run, trained now, and the one before it that its masks come from.

    None if its numbers do not stay finite, now or when it was tried before: that is said, and
    leaves a file.
    """
    failed = _failed(folder, config)
    if failed is None:
        try:
            if config.method.ticket:
                ticket = config_lib.changed(config, {"method.name": TICKETS, "method.ticket": ""})
                found = pathlib.Path(config.method.ticket)
                _finished(found, ticket) or _train(ticket, found)
            return _train(config, folder)
        except recovery.NonFiniteError as error:
            failed = {"config": config_lib.to_json(config), "reason": str(error)}
            folder.mkdir(parents=True, exist_ok=True)
            files.write(folder / FAILED_FILE, failed)
    console.print(
        f"{folder} failed: {failed['reason']}; delete {FAILED_FILE} there to try again",
        markup=False,
    )
    return None


def _failed(folder: pathlib.Path, config: config_lib.Config) -> dict[str, Any] | None:
    """What a run of this config that failed has left; None if it has not, or of another config."""
    path = folder / FAILED_FILE
    if not path.exists():
        return None
    found = files.read(path, "what is left of a failed run", {"config": {}, "reason": files.TEXT})
    return None if config_lib.differences(found["config"], config) else found


def _recorded(path: pathlib.Path | None, config: config_lib.Config) -> dict[str, Any] | None:
    if path is None or not path.exists():
        return None
    record = files.read(path, "the record of a run", files.RESULT)
    saved = config_lib.from_mapping(record["config"])
    # A ticket is the run of the same arm and seed, in whichever workdir that was.
    if _arm_and_seed(saved.method.ticket) == _arm_and_seed(config.method.ticket):
        saved = config_lib.changed(saved, {"method.ticket": config.method.ticket})
    changed = config_lib.differences(config_lib.to_json(saved), config)
    if changed:
        raise ValueError(f"{path} is of another config ({'; '.join(changed)}); delete it")
    return record


def _arm_and_seed(ticket: str) -> tuple[str, ...]:
    return pathlib.Path(ticket).parts[-2:]


def _finished(folder: pathlib.Path, config: config_lib.Config) -> dict[str, Any] | None:
    path = folder / checkpoints.RESULT_FILE
    if not path.exists():
        return None
    result = files.read(path, "the result of a run", files.RESULT)
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


def curves(results: Results) -> dict[float, list[figures.Curve]]:
    """Validation curves of all methods at each sparsity; those without masks are in each.

    Arms in `without_curves` are left out, and so are sparsities at which nothing is left.
    """
    left_out = without_curves(results)
    panels: dict[float, list[figures.Curve]] = {}
    for part in sorted({arm.sparsity for arm in results if arm.sparsity is not None}):
        chosen = {a: r for a, r in results.items() if r and a not in left_out}
        if any(arm.sparsity == part for arm in chosen):
            panels[part] = [
                _curve(arm, found) for arm, found in chosen.items() if arm.sparsity in (None, part)
            ]
    return panels


def without_curves(results: Results) -> list[Arm]:
    """Arms of which no curve can be drawn.

    Their records hold none, or were evaluated at other steps for each seed.
    """
    found = []
    for arm, each in results.items():
        steps = {tuple(m["step"] for m in result.get("curve", ())) for result in each}
        if each and (len(steps) > 1 or steps == {()}):
            found.append(arm)
    return found


def _curve(arm: Arm, found: list[dict[str, Any]]) -> figures.Curve:
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
    """Live connections of each input pixel before and after training, of the first seed's networks.

    A network whose last checkpoint is not there is left out: its result may be a record from
    elsewhere. Runs are only looked at, also those that are training.

    Args:
      base: The config of the comparison, of a fully connected network.
      compared: The masked arms to look at; their runs have finished.
      workdir: Of the comparison.
      say: Told of what is left out.

    Returns:
      `{sparsity: maps}`.
    """
    panels: dict[float, list[figures.Connections]] = {}
    for arm, config, folder in runs(base, compared, 1, workdir):
        if arm.sparsity is None:
            continue
        run = final = None
        if (folder / "checkpoints").exists():
            run = setup.prepare(config)
            with checkpoints.read_checkpoints(folder) as saved:
                final = checkpoints.restore_newest(saved, run.initial, say, config)
        if run is None or final is None or int(final.step) != config.steps:
            say(
                f"{folder}: no checkpoint of step {config.steps}, left out of the picture of inputs"
            )
            continue
        before, after = (
            _input_connections(run.representation.weight_masks(state), run.task.image_shape)
            for state in (run.initial, final)
        )
        panels.setdefault(arm.sparsity, []).append(figures.Connections(arm.method, before, after))
    return panels


def _input_connections(masks: Any, image_shape: tuple[int, ...]) -> np.ndarray:
    """Active weights of each pixel in the first kernel that has a row for each."""
    pixels = math.prod(image_shape)
    kernels = [m for m in jax.tree.leaves(masks) if m.ndim == 2 and m.shape[0] == pixels]
    return np.asarray(kernels[0]).sum(1).reshape(image_shape)
