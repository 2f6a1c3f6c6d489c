"""Implements the command: trains what is missing of a claim, prints its table, draws its figure."""

import argparse
import dataclasses
import pathlib
import sys
from collections.abc import Sequence
from typing import NoReturn

import jax
from absl import logging

from rigl_optax.reports.reproduce import claims, page, picture, trials
from rigl_optax.training import display, mistakes, signals

RECORDS = pathlib.Path("results/reproduce")
WORKDIR = pathlib.Path("runs/reproduce")


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        print(f"{message}; pass --help for the options", file=sys.stderr)
        sys.exit(mistakes.MISTAKEN)


def main(argv: Sequence[str]) -> int:
    """Runs the command.

    Args:
      argv: The arguments, without the name of the program.

    Returns:
      The exit status: 2 for a mistake of the user, 143 if it was asked to stop.
    """
    options = _parser().parse_args(argv)
    try:
        if options.list:
            print(_listing())
            return 0
        return _reproduce(options)
    except (Exception, KeyboardInterrupt) as error:
        if mistakes.status(error) is None:
            raise
        return mistakes.report(error)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="reproduce",
        description="Trains the runs of a claim of the RigL paper, prints their table and draws "
        "their figure. Started again, it goes on where it was interrupted: a run that has a record "
        "is not run again. Delete a record to repeat its run.",
    )
    parser.add_argument("name", nargs="?", help="the claim, see --list")
    parser.add_argument("--list", action="store_true", help="lists the claims and their runs")
    parser.add_argument("--seeds", type=int, help="runs of each arm, from seed 0")
    parser.add_argument("--task", help="one of the claim's tasks only")
    parser.add_argument(
        "--sparsities", help="arms of these only, as .98,.99; 0 for those that have none"
    )
    parser.add_argument(
        "--quick", action="store_true", help="a few steps of a few arms, to see that it works"
    )
    parser.add_argument("--notrain", action="store_true", help="shows the runs that are there")
    parser.add_argument("--workdir", type=pathlib.Path, help=f"of the runs; by default {WORKDIR}")
    parser.add_argument("--records", type=pathlib.Path, help=f"of the runs; by default {RECORDS}")
    return parser


def _listing() -> str:
    lines = []
    for claim in claims.CLAIMS.values():
        lines.append(f"{claim.name}: {claim.title}")
        for each in claim.experiments:
            tuned = len(dict.fromkeys(map(each.tuned_as, each.arms)))
            runs = len(each.arms) * each.seeds + tuned * len(each.rates) * each.tuning_seeds
            lines.append(
                f"  {each.task}: {len(each.arms)} arms, {each.seeds} seeds, {len(each.rates)} "
                f"rates: {runs} runs"
            )
    return "\n".join(lines)


def _reproduce(options: argparse.Namespace) -> int:
    if options.name is None:
        raise ValueError(f"give the name of a claim: {', '.join(claims.CLAIMS)}; or --list")
    claim = _chosen(claims.find(options.name), options)
    # What a quick run finds is no evidence: it stays out of the records.
    default = WORKDIR / "quick" if options.quick else WORKDIR
    workdir = (options.workdir or default) / claim.name
    records = (options.records or (default / "records" if options.quick else RECORDS)) / claim.name
    logging.set_verbosity(logging.WARNING)  # Orbax tells a lot at INFO
    # Runs that differ in their seed only share their compiled steps.
    jax.config.update("jax_compilation_cache_dir", str((workdir.parent / "compiled").absolute()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    console = display.make_console()
    found = {}
    try:
        for each in claim.experiments:
            folders = workdir / each.task, records / each.task
            found[each] = trials.find(each, *folders, console, train=not options.notrain)
    except signals.StoppedError as stopped:
        console.print(f"{stopped}; the same command goes on", markup=False)
        return int(signals.STOPPED)
    found = {each: one for each, one in found.items() if any(one.results.values())}
    if not found:
        raise ValueError(f"{records}: no run of {claim.name} has a result yet")
    workdir.mkdir(parents=True, exist_ok=True)
    table = page.table(found)
    (workdir / "table.md").write_text(table)
    picture.draw(found, workdir / "figure.png")
    console.print(table, markup=False, soft_wrap=True)
    console.print(f"wrote {workdir / 'table.md'} and {workdir / 'figure.png'}", markup=False)
    return 0


def _chosen(claim: claims.Claim, options: argparse.Namespace) -> claims.Claim:
    """Returns the claim as the options ask."""
    found = list(claim.experiments)
    if options.task is not None:
        found = [each for each in found if each.task == options.task]
        if not found:
            tasks = ", ".join(each.task for each in claim.experiments)
            raise ValueError(f"--task={options.task}: tasks of {claim.name} are {tasks}")
    if options.quick:
        found = [found[0].quick()]
    if options.sparsities is not None:
        found = [_only(each, options.sparsities) for each in found]
    if options.seeds is not None:
        if options.seeds < 1:
            raise ValueError(f"--seeds={options.seeds}: must be 1 or more")
        found = [dataclasses.replace(each, seeds=options.seeds) for each in found]
    return dataclasses.replace(claim, experiments=tuple(found))


def _only(experiment: claims.Experiment, words: str) -> claims.Experiment:
    """Returns the experiment with the arms of some sparsities, as `0,.98`."""
    there = {str(float(arm.sparsity or 0)) for arm in experiment.arms}
    try:
        wanted = {str(float(word)) for word in words.split(",")}
    except ValueError as error:
        raise ValueError(f"--sparsities={words}: must be numbers") from error
    if wanted - there:
        raise ValueError(
            f"--sparsities={words}: those of {experiment.task} are {', '.join(sorted(there))}"
        )
    arms = tuple(arm for arm in experiment.arms if str(float(arm.sparsity or 0)) in wanted)
    return dataclasses.replace(experiment, arms=arms)
