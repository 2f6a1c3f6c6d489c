"""Prints text from a checkpoint of a run on a text; the text itself is not needed.

python scripts/sample.py --workdir=runs/tdavid --length=500 --prompt="The Lord" [--step=best]

On the CPU, so that a run that is training keeps its accelerator; JAX_PLATFORMS=cuda in the
environment uses one.
"""

from absl import flags, logging

from rigl_optax import training
from rigl_optax.training import command_line, sampling

_WORKDIR = flags.DEFINE_string("workdir", None, "The run's.", required=True)
_STEP = command_line.define_step()
_LENGTH = flags.DEFINE_integer("length", 500, "Bytes to draw.", lower_bound=1)
_PROMPT = flags.DEFINE_string("prompt", "\n", "What is read first.")
_TEMPERATURE = flags.DEFINE_float("temperature", 0.8, "0: the likeliest byte.", lower_bound=0.0)
_SEED = flags.DEFINE_integer("seed", 0, "Of the draws.", lower_bound=0)


def main(argv: list[str]) -> None:
    """Restores a checkpoint and samples."""
    del argv
    logging.set_verbosity(logging.WARNING)  # Orbax tells a lot at INFO
    command_line.use_cpu()
    run, state = training.load(_WORKDIR.value, _STEP.value)
    drawn = sampling.sample(
        run,
        state,
        _LENGTH.value,
        prompt=_PROMPT.value.encode(),
        temperature=_TEMPERATURE.value,
        seed=_SEED.value,
    )
    print(_PROMPT.value + drawn.decode(errors="replace"))


if __name__ == "__main__":
    command_line.run(main)
