"""Reproduces a claim of the RigL paper in miniature: trains its runs, shows a table and a figure.

    rigl-optax reproduce --list
    rigl-optax reproduce methods --task=digits --workdir=runs/reproduce

Started again, it goes on where it was interrupted: a run that has a record is not run again. Delete
a record to repeat its run. SIGTERM saves the run at hand and ends with status 143.
"""

import dataclasses
import pathlib
from collections.abc import Sequence

import jax
from absl import flags

from rigl_optax.reports.reproduce import claims, page, picture, trials
from rigl_optax.training import display, signals
from rigl_optax_cli import command_line

_WORKDIR, _RECORDS = "runs/reproduce", "results/reproduce"


def main(argv: Sequence[str]) -> int:
    """Runs `rigl-optax reproduce`; returns the exit status."""
    if argv and not argv[0].startswith("-"):
        argv = [f"--claim={argv[0]}", *argv[1:]]
    return command_line.run(_reproduce, argv, __doc__, _define)


def _define(values: flags.FlagValues) -> None:
    text, words, switch = flags.DEFINE_string, flags.DEFINE_list, flags.DEFINE_bool
    text("claim", None, "The claim, as --list names it; may be given as the first word.", values)
    switch("list", False, "List the claims and their runs.", values)
    flags.DEFINE_integer("seeds", None, "Runs of each arm, from seed 0.", 1, flag_values=values)
    text("task", None, "One of the claim's tasks only.", values)
    about = "Arms of these only, as .98,.99; 0 for those that have none."
    words("sparsities", None, about, values)
    switch("quick", False, "A few steps of a few arms, to see that it works.", values)
    switch("train", True, "Train what is missing; or show what is there.", values)
    text("workdir", None, f"Where runs, table and figure go; {_WORKDIR} if not given.", values)
    text("records", None, f"Where records of runs go; {_RECORDS} if not given.", values)


def _reproduce(values: flags.FlagValues) -> int:
    if values.list:
        print(_listing())
        return 0
    if values.claim is None:
        raise ValueError(f"which claim? Give, as the first word, one of {', '.join(claims.CLAIMS)}")
    claim = claims.find(values.claim)
    experiments = _chosen(claim, values)
    # What a quick run finds is no evidence: it stays out of the records.
    parent = pathlib.Path(values.workdir or _WORKDIR) / ("quick" * values.quick)
    default = parent / "records" if values.quick else pathlib.Path(_RECORDS)
    records = (pathlib.Path(values.records) if values.records else default) / claim.name
    workdir = parent / claim.name
    # Runs that differ in their seed only share their compiled steps.
    jax.config.update("jax_compilation_cache_dir", str((parent / "compiled").absolute()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    if not values.train:
        command_line.use_cpu()
    console = display.make_console()
    found = {}
    try:
        for each in experiments:
            folders = workdir / each.task, records / each.task
            found[each] = trials.find(each, *folders, console, train=values.train)
    except signals.StoppedError as stopped:
        console.print(f"{stopped}; the same command goes on", markup=False)
        return signals.STOPPED
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


def _chosen(claim: claims.Claim, values: flags.FlagValues) -> list[claims.Experiment]:
    """Returns the experiments of a claim, as the flags ask."""
    found = list(claim.experiments)
    if values.task is not None:
        found = [each for each in found if each.task == values.task]
        if not found:
            tasks = ", ".join(each.task for each in claim.experiments)
            raise ValueError(f"--task={values.task}: tasks of {claim.name} are {tasks}")
    if values.quick:
        found = [found[0].quick()]
    if values.sparsities is not None:
        found = [_only(each, values.sparsities) for each in found]
    if values.seeds is not None:
        found = [dataclasses.replace(each, seeds=values.seeds) for each in found]
    return found


def _only(experiment: claims.Experiment, words: Sequence[str]) -> claims.Experiment:
    """Returns the experiment with the arms of some sparsities."""
    there = {float(arm.sparsity or 0) for arm in experiment.arms}
    given = f"--sparsities={','.join(words)}"
    try:
        wanted = {float(word) for word in words}
    except ValueError as error:
        raise ValueError(f"{given}: must be numbers") from error
    if wanted - there:
        known = ", ".join(f"{part:g}" for part in sorted(there))
        raise ValueError(f"{given}: those of {experiment.task} are {known}")
    arms = tuple(arm for arm in experiment.arms if float(arm.sparsity or 0) in wanted)
    return dataclasses.replace(experiment, arms=arms)
