"""Methods against each other at equal sparsity, over several seeds.

python scripts/compare.py --config=configs/digits_lenet.py --workdir=runs/digits-comparison
python scripts/compare.py --config=configs/fashion_mnist_lenet.py --sparsities=.95,.98 \
    --workdir=runs/fashion-mnist-comparison

Started again, it goes on where it was interrupted: finished runs are not run again. SIGTERM saves
the run at hand and ends with status 143. A run whose numbers do not stay finite is noted as failed,
and the others go on. With --notrain it shows the runs that are there, on the CPU.
"""

if __name__ == "__main__":
    import huge_pages

    huge_pages.use()

import ast
import pathlib
import sys

import jax
from absl import flags, logging
from rich.console import Console

from rigl_optax.reports import comparison, comparison_figures, figures, summary
from rigl_optax.training import (
    command_line,
    display,
    files,
    methods,
    score,
    signals,
    sparsity,
)
from rigl_optax.training import config as config_lib

command_line.define_config()
_WORKDIR = flags.DEFINE_string("workdir", None, "Where files and pictures go.", required=True)
_METHODS = flags.DEFINE_list(
    "methods", ["dense", "static", "set", "rigl"], "What to compare, or all."
)
_SPARSITIES = flags.DEFINE_list("sparsities", None, "At which sparsities; the config's if none.")
_STRUCTURES = flags.DEFINE_multi_string(
    "structure",
    None,
    "As config.method.structure: a name, or a dict as "
    "\"{'name': 'block', 'rows': 16, 'cols': 16}\"; may be given several times.",
)
_RECORDS = flags.DEFINE_string("records", None, "Folder for a small JSON of each finished run.")
_TRAIN = flags.DEFINE_bool("train", True, "Train what is missing; or show what is there.")
_CURVES = flags.DEFINE_bool("curves", True, "Draw learning curves and input connections.")
_EQUAL_FLOPS = flags.DEFINE_bool(
    "equal_flops", False, "Also train what costs more than RigL for fewer steps, at its FLOPs."
)
_SEEDS = flags.DEFINE_integer("seeds", 5, "Runs of each, from the config's seed on.", lower_bound=1)


def main(argv: list[str]) -> None:
    """Trains all runs, prints the table, writes the pictures."""
    del argv
    logging.set_verbosity(logging.WARNING)  # Orbax tells a lot at INFO
    base = command_line.checked()
    workdir = pathlib.Path(_WORKDIR.value)
    # Runs that differ in their seed only share their compiled steps.
    jax.config.update("jax_compilation_cache_dir", str((workdir / "compiled").absolute()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    sparsities = _sparsities(_SPARSITIES.value) or [base.method.sparsity]
    if not _TRAIN.value:
        command_line.use_cpu()
    console = display.make_console()
    names = list(methods.METHODS) if _METHODS.value == ["all"] else _METHODS.value
    compared = comparison.arms(
        names, sparsities, _structures(_STRUCTURES.value) or [base.method.structure]
    )
    if _EQUAL_FLOPS.value:
        compared += comparison.at_equal_flops(base, compared)
    records_dir = None if _RECORDS.value is None else pathlib.Path(_RECORDS.value)
    try:
        results = comparison.run_all(
            base, compared, _SEEDS.value, workdir, console, records_dir, _TRAIN.value
        )
    except signals.StoppedError as stopped:
        console.print(f"{stopped}; the same command goes on", markup=False)
        sys.exit(signals.STOPPED)

    failed = comparison.failures(base, compared, _SEEDS.value, workdir)
    records = summary.summary(results, failed)
    if not records:
        sys.exit(f"{workdir}: no run has a result yet")
    spread = ", mean ± std over seeds" if _SEEDS.value > 1 else ""
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
    if _CURVES.value:
        _draw_curves(base, compared, results, workdir, console, measure)


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


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    command_line.run(main)
