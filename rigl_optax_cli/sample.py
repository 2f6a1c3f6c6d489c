"""Prints text from a checkpoint of a run on a text; the text itself is not needed.

    rigl-optax sample --workdir=runs/tdavid --length=500 --prompt="The Lord"

On the CPU, so that a run that is training keeps its accelerator; JAX_PLATFORMS=cuda in the
environment uses one.
"""

from collections.abc import Sequence

from absl import flags

from rigl_optax import training
from rigl_optax.training import sampling
from rigl_optax_cli import command_line


def main(argv: Sequence[str]) -> int:
    """Runs `rigl-optax sample`; returns the exit status."""
    return command_line.run(_sample, argv, __doc__, _define)


def _define(values: flags.FlagValues) -> None:
    command_line.define_workdir(values)
    command_line.define_step(values)
    integer = flags.DEFINE_integer
    integer("length", 500, "Bytes to draw.", lower_bound=1, flag_values=values)
    flags.DEFINE_string("prompt", "\n", "What is read first.", values)
    about = "0: the likeliest byte."
    flags.DEFINE_float("temperature", 0.8, about, lower_bound=0.0, flag_values=values)
    integer("seed", 0, "Of the draws.", lower_bound=0, flag_values=values)


def _sample(values: flags.FlagValues) -> None:
    command_line.use_cpu()
    run, state = training.load(values.workdir, values.step)
    drawn = sampling.sample(
        run,
        state,
        values.length,
        prompt=values.prompt.encode(),
        temperature=values.temperature,
        seed=values.seed,
    )
    print(values.prompt + drawn.decode(errors="replace"))
