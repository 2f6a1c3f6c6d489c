"""Writes a trained network in all its forms; with --measure says which is the fastest here.

    rigl-optax export --workdir=runs/digits --measure
    rigl-optax export --workdir=runs/digits --out=handed_over --step=best

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
    command_line.define_step(values)
    about = "A folder for the files; `export` in the workdir if not given."
    flags.DEFINE_string("out", None, about, values)
    about = "Times all forms, and compares their accuracy."
    flags.DEFINE_bool("measure", False, about, values)
    about = "On which accuracy is measured; test if not given."
    flags.DEFINE_enum("split", None, _SPLITS, about, values)


def _export(values: flags.FlagValues) -> None:
    command_line.use_cpu()
    if values.split is not None and not values.measure:
        raise ValueError(f"--split={values.split}: only with --measure")
    run, state = training.load(values.workdir, values.step)
    folder = pathlib.Path(values.out or pathlib.Path(values.workdir) / "export")
    split = None
    if values.measure and values.split != "none":
        split = getattr(run.dataset, values.split or "test")
    print(deploy.hand_over(run, state, folder, measures=values.measure, split=split))
