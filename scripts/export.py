"""Writes a trained network in all its forms, measures them here, and says which is the fastest.

python scripts/export.py --workdir=runs/digits --out=runs/digits/export [--step=best]

On the CPU; JAX_PLATFORMS=cuda in the environment uses an accelerator. docs/deploy.md describes the
files.
"""

import pathlib

from absl import flags, logging

from rigl_optax import training
from rigl_optax.training import command_line, deploy

_WORKDIR = flags.DEFINE_string("workdir", None, "Of the run.", required=True)
_OUT = flags.DEFINE_string(
    "out", None, "A folder for the files; made if it is not there.", required=True
)
_STEP = command_line.define_step()
_SPLIT = flags.DEFINE_enum(
    "split", "test", ["validation", "test", "none"], "On which accuracy is measured."
)


def main(argv: list[str]) -> None:
    """Writes the files and prints the table."""
    del argv
    logging.set_verbosity(logging.WARNING)  # Orbax tells a lot at INFO
    command_line.use_cpu()
    run, state = training.load(_WORKDIR.value, _STEP.value)
    folder = pathlib.Path(_OUT.value)
    folder.mkdir(parents=True, exist_ok=True)
    found, missing = deploy.forms(run, state)
    deploy.write(folder, run, state, found)
    split = None if _SPLIT.value == "none" else getattr(run.dataset, _SPLIT.value)
    measured = deploy.measure(folder, run, state, found, split)
    deploy.record(folder, measured)
    print(deploy.table(measured, missing))


if __name__ == "__main__":
    command_line.run(main)
