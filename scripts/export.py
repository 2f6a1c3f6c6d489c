"""Writes a trained network in all its forms; and measures them here, and says which is the fastest.

python scripts/export.py --workdir=runs/digits --measure [--out=FOLDER] [--step=best]

On the CPU; JAX_PLATFORMS=cuda in the environment uses an accelerator. docs/deploy.md describes the
files.
"""

import pathlib

from absl import flags, logging

from rigl_optax import training
from rigl_optax.training import command_line, deploy

_WORKDIR = flags.DEFINE_string("workdir", None, "Of the run.", required=True)
_OUT = flags.DEFINE_string("out", None, "A folder for the files; `export` in the workdir.")
_STEP = command_line.define_step()
_MEASURE = flags.DEFINE_bool("measure", False, "Times all forms, and compares their accuracy.")
_SPLIT = flags.DEFINE_enum(
    "split", "test", ["validation", "test", "none"], "On which accuracy is measured."
)


def main(argv: list[str]) -> None:
    """Writes the files; prints what they are, and the table."""
    del argv
    logging.set_verbosity(logging.WARNING)  # Orbax tells a lot at INFO
    command_line.use_cpu()
    run, state = training.load(_WORKDIR.value, _STEP.value)
    folder = pathlib.Path(_OUT.value or pathlib.Path(_WORKDIR.value) / "export")
    split = None
    if _MEASURE.value and _SPLIT.value != "none":
        split = getattr(run.dataset, _SPLIT.value)
    print(deploy.hand_over(run, state, folder, measures=_MEASURE.value, split=split))


if __name__ == "__main__":
    command_line.run(main)
