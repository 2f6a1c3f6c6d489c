"""Dense, static, SET and RigL against each other at equal sparsity, over several seeds.

python scripts/compare.py --config=configs/digits_lenet.py --workdir=runs/digits-comparison
python scripts/compare.py --config=configs/fashion_mnist_lenet.py --sparsities=.95,.98 \
    --workdir=runs/fashion-mnist-comparison

Started again, it goes on where it was interrupted: finished runs are not run again.
"""

import pathlib

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from rigl_optax.training import checkpoints, command_line, comparison, display, figures, summary

_CONFIG = config_flags.DEFINE_config_file("config", None, "The recipe.", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Where files and pictures go.", required=True)
_METHODS = flags.DEFINE_list("methods", ["dense", "static", "set", "rigl"], "What to compare.")
_SPARSITIES = flags.DEFINE_list("sparsities", None, "At which sparsities; the config's if none.")
_SEEDS = flags.DEFINE_integer("seeds", 5, "Runs of each, from the config's seed on.", lower_bound=1)


def main(argv: list[str]) -> None:
    """Trains all runs, prints the table, writes the pictures."""
    del argv
    logging.set_verbosity(logging.WARNING)  # Orbax tells a lot at INFO
    base = command_line.checked(_CONFIG.value)
    workdir = pathlib.Path(_WORKDIR.value)
    # Runs that differ in their seed only share their compiled steps.
    jax.config.update("jax_compilation_cache_dir", str((workdir / "compiled").absolute()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    sparsities = [float(s) for s in _SPARSITIES.value or [base.sparsity]]
    console = display.make_console()
    compared = comparison.arms(_METHODS.value, sparsities)
    results = comparison.run_all(base, compared, _SEEDS.value, workdir, console)

    records = summary.summary(results)
    title = f"{base.model} on {base.dataset}: {base.steps} steps, {_SEEDS.value} seeds, mean ± std"
    console.print(summary.table(records, title))
    checkpoints.write_json(workdir / "summary.json", records)
    curves = workdir / "learning_curves.png"
    figures.learning_curves(
        comparison.curves(results, workdir),
        f"{base.dataset}: mean and range over {_SEEDS.value} seeds",
        curves,
    )
    pixels = workdir / "input_connections.png"
    shown = [arm for arm in compared if arm.method in ("static", "rigl")]
    figures.input_connections(
        comparison.connections(base, shown, workdir),
        f"{base.dataset}: live connections of each input pixel, seed {base.seed}",
        pixels,
    )
    console.print(f"wrote {workdir / 'summary.json'}, {curves}, {pixels}")


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    app.run(main, flags_parser=command_line.parse)
