"""Runs several methods, sparsities and seeds; each run has a folder of its own."""

import math
import pathlib
import re
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import track

from rigl_optax.training import (
    checkpoints,
    costs,
    files,
    loop,
    methods,
    recovery,
    score,
    setup,
    sparsity,
    tasks,
)
from rigl_optax.training import config as config_lib

LOG_FILE = "log.txt"
FAILED_FILE = "failed.json"
YARDSTICK = "rigl"  # the method whose training FLOPs others get to spend
TICKETS = "rigl"  # the method whose final masks are lottery tickets


class Arm(NamedTuple):
    """One line of the table: a method at a sparsity.

    Attributes:
      method: Its name in a config.
      sparsity: None for a method that has none.
      structure: As `config.method.structure`.
      steps: Of an arm that trains for another number of steps than the config, or None.
      name: Tells arms of one method and sparsity apart, for people and in the name of the folder.
      changes: Pairs of a key and a value: what else differs from the config.
    """

    method: str
    sparsity: float | None
    structure: config_lib.Structure = config_lib.Structure()
    steps: int | None = None
    name: str = ""
    changes: tuple[tuple[str, Any], ...] = ()

    @property
    def folder(self) -> str:
        """The name of its folder in the workdir."""
        parts = [self.method, "" if self.sparsity is None else str(self.sparsity)]
        parts += re.findall(r"\w+", sparsity.describe(self.structure))
        parts += [] if self.steps is None else [f"steps{self.steps}"]
        parts += re.findall(r"[\w.]+", self.name)
        return "-".join(filter(None, parts))

    @property
    def label(self) -> str:
        """The name of the method, its structure, its own name and steps, for people."""
        name = f"{self.method} {sparsity.describe(self.structure)}".rstrip()
        steps = "" if self.steps is None else f"{self.steps:,} steps"
        return ", ".join(filter(None, (name, self.name, steps)))


# The part of a run's result that a record keeps.
RECORDED = (
    "config",
    "validation",
    "test",
    "active_weights",
    "weights",
    "flops",
    "coverage",
    "effective_units",
    "curve",
    "warnings",
    "machine",
)
Results = dict[Arm, list[dict[str, Any]]]  # of each arm one result per seed, in order


def arms(
    names: Sequence[str],
    sparsities: Sequence[float],
    structures: Sequence[config_lib.Structure] = (config_lib.Structure(),),
) -> list[Arm]:
    """Lists every method at every sparsity; methods that have none come first, and once.

    Args:
      names: Names of methods.
      sparsities: In [0, 1).
      structures: As `config.method.structure`; a method that takes none is compared without.

    Raises:
      ValueError: If no method has that name; the message lists those there are.
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


def at_equal_flops(base: config_lib.Config, compared: Sequence[Arm]) -> list[Arm]:
    """Lists arms that are trained for fewer steps, so that they spend the training FLOPs of RigL.

    There is one for each arm whose training costs at least 10 % more than RigL's at the same
    sparsity and structure, and for the dense network one at each sparsity.

    Args:
      base: The config; method, sparsity and structure are replaced.
      compared: From `arms`.

    Raises:
      ValueError: If RigL is not compared, or a method starts from the masks of another run.
    """
    yardsticks = [arm for arm in compared if arm.method == YARDSTICK]
    if not yardsticks:
        raise ValueError(f"methods to compare at equal FLOPs: {YARDSTICK} must be one of them")
    found = []
    for yardstick in yardsticks:
        part, structure = yardstick.sparsity, yardstick.structure
        budget = costs.planned(_config(base, yardstick))
        for name in dict.fromkeys(a.method for a in compared if a.sparsity in (None, part)):
            arm = Arm(name, part, structure)
            if costs.planned(_config(base, arm)) > 1.1 * budget:
                found.append(arm._replace(steps=_affordable(base, arm, budget)))
    return found


def _affordable(base: config_lib.Config, arm: Arm, budget: float) -> int:
    """Returns for how many steps an arm trains with so many FLOPs."""
    steps = base.steps
    for _ in range(8):  # the cost of a step depends on their number, but little
        spent = costs.planned(_config(base, arm._replace(steps=steps)))
        if (fewer := max(1, round(steps * budget / spent))) == steps:
            break
        steps = fewer
    return steps


def _config(base: config_lib.Config, arm: Arm) -> config_lib.Config:
    """Returns the config of an arm."""
    changes: dict[str, Any] = {"method.name": arm.method, "method.condensed": False}
    if arm.steps is not None:
        changes["steps"] = arm.steps
    if arm.sparsity is None or not methods.METHODS[arm.method].masked:
        changes["method.structure"] = config_lib.Structure()
    else:
        changes["method.structure"] = arm.structure
    if arm.sparsity is not None:
        changes["method.sparsity"] = arm.sparsity
    config = config_lib.changed(config_lib.changed(base, changes), dict(arm.changes))
    is_stored = base.method.condensed and methods.can_be_stored(config)
    return config_lib.changed(config, {"method.condensed": is_stored})


def runs(
    base: config_lib.Config, compared: Sequence[Arm], seeds: int, workdir: pathlib.Path
) -> Iterator[tuple[Arm, config_lib.Config, pathlib.Path]]:
    """Yields arm, config and folder of each run, seed by seed: an early stop leaves all equal."""
    for seed in range(seeds):
        for arm in compared:
            config = config_lib.changed(_config(base, arm), {"seed": base.seed + seed})
            if methods.find(config).start == "ticket":
                ticket = workdir / _ticket_arm(compared, arm).folder / f"seed{config.seed}"
                config = config_lib.changed(config, {"method.ticket": str(ticket)})
            yield arm, config, workdir / arm.folder / f"seed{config.seed}"


def _ticket_arm(compared: Sequence[Arm], arm: Arm) -> Arm:
    """Returns the arm whose final masks an arm starts from, compared or not."""
    plain = Arm(TICKETS, arm.sparsity, arm.structure)
    alike = (other for other in compared if other._replace(changes=()) == plain)
    return next(alike, plain._replace(changes=arm.changes))


def refusals(base: config_lib.Config, compared: Sequence[Arm]) -> dict[Arm, str]:
    """Builds each arm from shapes alone, and returns why those that cannot be trained cannot.

    Args:
      base: As in `run_all`; its data are read for the shape of an example.
      compared: From `arms`.
    """
    facts = tasks.find(base).facts
    found = {}
    for arm in compared:
        try:
            setup.outline(_config(base, arm), facts)
        except ValueError as error:
            found[arm] = str(error)
    return found


def run_all(
    base: config_lib.Config,
    compared: Sequence[Arm],
    seeds: int,
    workdir: pathlib.Path,
    console: Console,
    records: pathlib.Path | None = None,
    train: bool = True,
    shown: str = "test",
) -> Results:
    """Trains the runs that have not finished, and reads the results of those that have.

    Args:
      base: The config; method, sparsity, structure and seed are replaced. With
        `method.condensed`, the arms that can store blocks do.
      compared: From `arms`.
      seeds: Runs of each arm, with the base's seed and those after it. All arms of a seed have
        the same initial weights and the same batches, and the same initial masks.
      workdir: Gets a folder for each run. A run that has finished is not repeated, nor is one
        whose losses or weights became non-finite: it leaves `failed.json`, and the others go on.
      console: Gets a line for each run as it ends.
      records: A folder for a small JSON of each run, to be kept. A run that has a record is not
        repeated either, unless another run needs its masks.
      train: Whether to train the runs that are missing, or leave them out.
      shown: The split whose score is printed: `test`, or `validation` where runs are to be chosen.

    Returns:
      The results of all runs that have one.

    Raises:
      StoppedError: If the process was asked to stop: the current run is saved, and the same
        command continues it.
    """
    todo = list(runs(base, compared, seeds, workdir))
    results: Results = {arm: [] for arm in compared}
    missing = [run[2] for run in todo if train and not _is_done(*run, records)]
    seconds: list[float] = []  # of the runs trained here
    bar = track(todo, "runs", console=console, disable=not console.is_terminal)
    for number, (arm, config, folder) in enumerate(bar, start=1):
        record = None if records is None else records / _record_name(arm, config)
        result = _recorded(record, config) or _finished(folder, config)
        if result is None:
            if not train:
                continue
            began = time.monotonic()
            ticket = _config(base, _ticket_arm(compared, arm)) if config.method.ticket else None
            result = _trained(config, folder, console, ticket)
            if folder in missing:
                missing.remove(folder)
                seconds.append(time.monotonic() - began)
            if result is None:
                continue
        if record is not None and not record.exists():
            record.parent.mkdir(parents=True, exist_ok=True)
            files.write(record, {key: result[key] for key in RECORDED if key in result})
        results[arm].append(result)
        label = arm.label + ("" if arm.sparsity is None else f" {arm.sparsity:g}")
        console.print(
            f"[{number}/{len(todo)}] {label:12} seed {config.seed}: "
            f"{shown} {score.of(result[shown]).text(result[shown])}{_left(seconds, len(missing))}",
            markup=False,
        )
        for warning in result["warnings"]:
            console.print(f"  warning: {warning}", markup=False)
    return results


def _record_name(arm: Arm, config: config_lib.Config) -> str:
    return f"{arm.folder}-seed{config.seed}.json"


def _is_done(
    arm: Arm, config: config_lib.Config, folder: pathlib.Path, records: pathlib.Path | None
) -> bool:
    """Tells whether a run has ended, well or not; what it left is not read."""
    left = [folder / checkpoints.RESULT_FILE]
    left += [] if records is None else [records / _record_name(arm, config)]
    return any(path.exists() for path in left) or _failed(folder, config) is not None


def _left(seconds: Sequence[float], runs_left: int) -> str:
    """Says how long the missing runs will take, as long as those trained so far took on average."""
    if not seconds or runs_left <= 0:
        return ""
    minutes = runs_left * statistics.mean(seconds) / 60
    return f"; {runs_left} run{'s' * (runs_left > 1)} left, about {math.ceil(minutes)} min"


def failures(
    base: config_lib.Config, compared: Sequence[Arm], seeds: int, workdir: pathlib.Path
) -> dict[Arm, list[int]]:
    """Lists the seeds of failed runs by arm; arguments as in `run_all`."""
    failed: dict[Arm, list[int]] = {}
    for arm, config, folder in runs(base, compared, seeds, workdir):
        if _failed(folder, config) is not None:
            failed.setdefault(arm, []).append(config.seed)
    return failed


def _trained(
    config: config_lib.Config,
    folder: pathlib.Path,
    console: Console,
    ticket: config_lib.Config | None,
) -> dict[str, Any] | None:
    """Trains a run, after the one that its masks come from, and returns its result.

    Args:
      config: Of the run.
      folder: Its workdir.
      console: Gets a line if it fails.
      ticket: The config of the run its masks come from, of whatever seed; None if there is none.

    Returns None if its numbers do not stay finite, or did not when it was tried before. It says
    so, and leaves `failed.json`.
    """
    failed = _failed(folder, config)
    if failed is None:
        try:
            if ticket is not None:
                ticket = config_lib.changed(ticket, {"seed": config.seed})
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
    """Reads `failed.json`; None if there is none, or it is of another config."""
    path = folder / FAILED_FILE
    if not path.exists():
        return None
    found = files.read(path, "the note of a failed run", {"config": {}, "reason": files.TEXT})
    return None if config_lib.differences(found["config"], config) else found


def _recorded(path: pathlib.Path | None, config: config_lib.Config) -> dict[str, Any] | None:
    """Reads the record of a run; None if there is none."""
    if path is None or not path.exists():
        return None
    record = files.read(path, "the record of a run", files.RESULT)
    saved = config_lib.from_mapping(record["config"])
    # A ticket is the run of the same arm and seed, in any workdir.
    if _arm_and_seed(saved.method.ticket) == _arm_and_seed(config.method.ticket):
        saved = config_lib.changed(saved, {"method.ticket": config.method.ticket})
    changed = config_lib.differences(config_lib.to_json(saved), config)
    if changed:
        raise ValueError(f"{path} is of another config ({'; '.join(changed)}); delete it")
    return record


def _arm_and_seed(ticket: str) -> tuple[str, ...]:
    """Returns the last two parts of a ticket's path, its folders of arm and seed."""
    return pathlib.Path(ticket).parts[-2:]


def _finished(folder: pathlib.Path, config: config_lib.Config) -> dict[str, Any] | None:
    """Reads the result of a run; None if it has not finished."""
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
    """Trains one run, whose output goes to a file in its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOG_FILE).open("a") as file:
        return loop.train(config, folder, Console(file=file, width=120, highlight=False))
