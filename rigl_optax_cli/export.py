"""Writes a trained network in all its forms, measures them here, and says which is the fastest.

    rigl-optax export --workdir=runs/digits --out=runs/digits/export
    rigl-optax export --workdir=runs/digits --out=runs/digits/export --step=best --split=none

On the CPU; JAX_PLATFORMS=cuda in the environment uses an accelerator. docs/deploy.md describes the
files.
"""

import pathlib
from collections.abc import Sequence

from absl import flags

from rigl_optax import training
from rigl_optax.training import deploy
from rigl_optax_cli import command_line

_SPLITS = ["validation", "test", "none"]


def main(argv: Sequence[str]) -> int:
    """Runs `rigl-optax export`; returns the exit status."""
    return command_line.run(_export, argv, __doc__, _define)


def _define(values: flags.FlagValues) -> None:
    command_line.define_workdir(values)
    about = "A folder for the files; made if it is not there."
    flags.DEFINE_string("out", None, about, values, required=True)
    command_line.define_step(values)
    flags.DEFINE_enum("split", "test", _SPLITS, "On which accuracy is measured.", values)


def _export(values: flags.FlagValues) -> None:
    command_line.use_cpu()
    run, state = training.load(values.workdir, values.step)
    folder = pathlib.Path(values.out)
    folder.mkdir(parents=True, exist_ok=True)
    found, missing = deploy.forms(run, state)
    deploy.write(folder, run, state, found)
    split = None if values.split == "none" else getattr(run.dataset, values.split)
    measured = deploy.measure(folder, run, state, found, split)
    deploy.record(folder, measured)
    print(deploy.table(measured, missing))
