r"""Trains methods against each other at equal sparsity, over several seeds.

    rigl-optax compare digits_lenet --workdir=runs/digits-comparison
    rigl-optax compare fashion_mnist_lenet --sparsities=.95,.98 --methods=all \
        --workdir=runs/fashion-mnist-comparison

Started again, it goes on where it was interrupted: finished runs are not run again. SIGTERM saves
the run at hand and ends with status 143. A run whose numbers do not stay finite is noted as failed,
and the others go on. With --notrain it shows the runs that are there, on the CPU.
"""

import ast
import pathlib
from collections.abc import Sequence

import jax
from absl import flags
from rich.console import Console

from rigl_optax.reports import comparison, comparison_figures, figures, summary
from rigl_optax.training import config as config_lib
from rigl_optax.training import display, files, methods, score, signals, sparsity
from rigl_optax_cli import command_line


def main(argv: Sequence[str]) -> int:
    """Runs `rigl-optax compare`; returns the exit status."""
    return command_line.run(_compare, argv, __doc__, _define, with_recipe=True)


def _define(values: flags.FlagValues) -> None:
    text, words, switch = flags.DEFINE_string, flags.DEFINE_list, flags.DEFINE_bool
    text("workdir", None, "Where files and pictures go.", values, required=True)
    words("methods", ["dense", "static", "set", "rigl"], "What to compare, or all.", values)
    words("sparsities", None, "At which sparsities; the recipe's if none.", values)
    flags.DEFINE_multi_string(
        "structure",
        None,
        "As config.method.structure: a name, or a dict as "
        "\"{'name': 'block', 'rows': 16, 'cols': 16}\"; may be given several times.",
        values,
    )
    text("records", None, "Folder for a small JSON of each finished run.", values)
    switch("train", True, "Train what is missing; or show what is there.", values)
    switch("curves", True, "Draw learning curves and input connections.", values)
    about = "Also train what costs more than RigL for fewer steps, at its FLOPs."
    switch("equal_flops", False, about, values)
    about = "Runs of each, from the recipe's seed on."
    flags.DEFINE_integer("seeds", 5, about, lower_bound=1, flag_values=values)


def _compare(values: flags.FlagValues) -> int:
    """Trains all runs, prints the table, writes the pictures."""
    base = command_line.checked(values)
    workdir = pathlib.Path(values.workdir)
    # Runs that differ in their seed only share their compiled steps.
    jax.config.update("jax_compilation_cache_dir", str((workdir / "compiled").absolute()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    sparsities = _sparsities(values.sparsities) or [base.method.sparsity]
    if not values.train:
        command_line.use_cpu()
    console = display.make_console()
    names = list(methods.METHODS) if values.methods == ["all"] else values.methods
    structures = _structures(values.structure) or [base.method.structure]
    compared = comparison.arms(names, sparsities, structures)
    if values.equal_flops:
        compared += comparison.at_equal_flops(base, compared)
    refused = comparison.refusals(base, compared) if values.train else {}
    for arm, why in refused.items():
        if values.methods != ["all"]:
            raise ValueError(f"{arm.label}: {why}")
        console.print(f"{arm.label} is left out: {why}", markup=False)
    compared = [arm for arm in compared if arm not in refused]
    records_dir = None if values.records is None else pathlib.Path(values.records)
    try:
        results = comparison.run_all(
            base, compared, values.seeds, workdir, console, records_dir, values.train
        )
    except signals.StoppedError as stopped:
        console.print(f"{stopped}; the same command goes on", markup=False)
        return signals.STOPPED

    failed = comparison.failures(base, compared, values.seeds, workdir)
    records = summary.summary(results, failed)
    if not records:
        raise RuntimeError(f"{workdir}: no run has a result yet")
    spread = ", mean ± std over seeds" if values.seeds > 1 else ""
    title = f"{base.model.name} on {base.data.name}: {base.steps} steps{spread}"
    console.print(summary.table(records, title))
    workdir.mkdir(parents=True, exist_ok=True)
    files.write(workdir / "summary.json", records)
    console.print(f"wrote {workdir / 'summary.json'}")
    measure = score.of(records[0], "test_")
    if any(record["sparsity"] is not None for record in records):
        cost = workdir / f"{measure.key}_against_cost.png"
        figures.score_against_cost(records, title, cost, measure)
        console.print(f"wrote {cost}")
    if values.curves:
        _draw_curves(base, compared, results, workdir, console, measure)
    return 0


def _sparsities(words: list[str] | None) -> list[float]:
    try:
        return [float(word) for word in words or []]
    except ValueError as error:
        raise ValueError(f"--sparsities={','.join(words or [])}: must be numbers") from error


def _structures(words: list[str] | None) -> list[config_lib.Structure]:
    found = []
    for word in words or []:
        try:
            values = ast.literal_eval(word) if word.startswith("{") else {"name": word}
        except (SyntaxError, ValueError) as error:
            raise ValueError(f"--structure={word!r}: must be a name or a dict") from error
        method = config_lib.from_mapping({"method": {"structure": values}}).method
        sparsity.check_structure(method.structure)
        found.append(method.structure)
    return found


def _draw_curves(
    base: config_lib.Config,
    compared: list[comparison.Arm],
    results: comparison.Results,
    workdir: pathlib.Path,
    console: Console,
    measure: score.Score,
) -> None:
    """Learning curves of all, and of images where the input connections of two methods go."""
    curves, panels = workdir / "learning_curves.png", comparison_figures.curves(results)
    left_out = comparison_figures.without_curves(results)
    if left_out:
        names = ", ".join(dict.fromkeys(arm.label for arm in left_out))
        console.print(f"no learning curves in the records of {names}: left out", markup=False)
    if panels:
        shown = [each for arm, each in results.items() if each and arm not in left_out]
        finished = sorted({len(each) for each in shown})
        seeds = " to ".join(str(n) for n in {finished[0]: None, finished[-1]: None})
        figures.learning_curves(
            panels,
            f"{base.model.name} on {base.data.name}: mean and range over {seeds} seeds",
            curves,
            measure,
        )
        console.print(f"wrote {curves}")
    if base.model.name != "lenet":
        return  # the others have no weights of single pixels
    pixels = workdir / "input_connections.png"
    looked_at = [arm for arm in compared if arm.method in ("static", "rigl")]
    maps = comparison_figures.connections(
        base, looked_at, workdir, lambda text: console.print(text, markup=False)
    )
    if not maps:
        return
    figures.input_connections(
        maps,
        f"{base.data.name}: live connections of each input pixel, seed {base.seed}",
        pixels,
    )
    console.print(f"wrote {pixels}")
