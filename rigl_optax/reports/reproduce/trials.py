"""Trains and reads the runs of a claim: first to choose learning rates, then those of the table."""

import pathlib
import statistics
from collections.abc import Mapping
from typing import NamedTuple

from rich.console import Console

from rigl_optax.reports import comparison
from rigl_optax.reports.comparison import Arm, Results
from rigl_optax.reports.reproduce.claims import TUNING_SEED, Experiment
from rigl_optax.training import config as config_lib
from rigl_optax.training import score

RATE = "optimizer.learning_rate"
TUNING = "tuning"  # the folder of the runs by which rates are chosen


class Found(NamedTuple):
    """The runs of an experiment.

    Attributes:
      results: Of each arm one result per seed; arms without a rate are left out.
      failed: Seeds of runs whose numbers did not stay finite, by arm.
      rates: The learning rate of each arm.
    """

    results: Results
    failed: Mapping[Arm, list[int]]
    rates: Mapping[Arm, float]


def find(
    experiment: Experiment,
    workdir: pathlib.Path,
    records: pathlib.Path,
    console: Console,
    *,
    train: bool = True,
) -> Found:
    """Trains the runs that are missing, and reads those that are there.

    Args:
      experiment: What to run.
      workdir: Gets a folder for each run.
      records: A folder with a small JSON of each finished run; those are not run again.
      console: Gets a line for each run.
      train: Whether to train, or to read what is there.

    Raises:
      StoppedError: As `comparison.run_all`.
    """
    tuned = {arm: experiment.tuned_as(arm) for arm in experiment.arms}
    trials = {
        _at_rate(arm, rate, name=f"rate {rate:g}"): (arm, rate)
        for arm in dict.fromkeys(tuned.values())
        for rate in experiment.rates
    }
    base = config_lib.changed(experiment.base, {"seed": TUNING_SEED})
    found = comparison.run_all(
        base,
        list(trials),
        experiment.tuning_seeds,
        workdir / TUNING,
        console,
        records / TUNING,
        train,
        shown="validation",
    )
    best = best_rates({trials[trial]: results for trial, results in found.items()})
    rates = {arm: best[like] for arm, like in tuned.items() if like in best}
    arms = {_at_rate(arm, rate): arm for arm, rate in rates.items()}
    results = comparison.run_all(
        experiment.base, list(arms), experiment.seeds, workdir, console, records, train
    )
    failed = comparison.failures(experiment.base, list(arms), experiment.seeds, workdir)
    return Found(
        {arms[arm]: each for arm, each in results.items()},
        {arms[arm]: seeds for arm, seeds in failed.items()},
        rates,
    )


def best_rates(found: Mapping[tuple[Arm, float], list[dict]]) -> dict[Arm, float]:  # type: ignore[type-arg]
    """Chooses the rate of the best mean validation score for each arm; of equals the lowest.

    Args:
      found: Results by arm and rate; a rate at which a run failed has fewer than the others.

    Returns:
      The rates; without arms that have no results.
    """
    most = max((len(results) for results in found.values()), default=0)
    ranks: dict[Arm, list[tuple[float, float]]] = {}
    for (arm, rate), results in found.items():
        if results and len(results) == most:
            judged = score.of(results[0]["validation"])
            rank = statistics.mean(judged.rank(result["validation"]) for result in results)
            ranks.setdefault(arm, []).append((rank, -rate))
    return {arm: -max(each)[1] for arm, each in ranks.items()}


def _at_rate(arm: Arm, rate: float, name: str = "") -> Arm:
    """Returns the arm at a rate; it keeps its name unless another is added."""
    full = ", ".join(filter(None, (arm.name, name)))
    return arm._replace(name=full, changes=(*arm.changes, (RATE, rate)))
