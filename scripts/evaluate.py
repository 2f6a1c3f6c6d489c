"""Evaluates a checkpoint of a run; and hands over its weights and masks.

python scripts/evaluate.py --workdir=runs/digits --split=validation
python scripts/evaluate.py --workdir=runs/digits --step=best --export=digits.safetensors

On the CPU, so that a run that is training keeps its accelerator; JAX_PLATFORMS=cuda in the
environment uses one.
`rigl_optax.export.read` reads the file; docs/deploy.md describes it.
"""

import pathlib

from absl import flags, logging

from rigl_optax import training
from rigl_optax.training import command_line, evaluation, export, score

_WORKDIR = flags.DEFINE_string("workdir", None, "Of the run.", required=True)
_SPLIT = flags.DEFINE_enum("split", "test", ["train", "validation", "test"], "What to evaluate on.")
_STEP = command_line.define_step()
_EXPORT = flags.DEFINE_string("export", None, "A file for weights and masks, .safetensors.")


def main(argv: list[str]) -> None:
    """Prints loss, accuracy and, of a text, bits per byte."""
    del argv
    logging.set_verbosity(logging.WARNING)  # Orbax tells a lot at INFO
    command_line.use_cpu()
    if _EXPORT.value and pathlib.Path(_EXPORT.value).suffix != export.SUFFIX:
        command_line.refuse(f"--export={_EXPORT.value}: must end in {export.SUFFIX}")
    run, state = training.load(_WORKDIR.value, _STEP.value)
    found = evaluation.evaluator(run)(state, getattr(run.dataset, _SPLIT.value))
    print(
        f"step {int(state.step)}  {_SPLIT.value}  loss {found['loss']:.4f}  "
        f"accuracy {100 * found['accuracy']:.2f} %"
        + (f"  {score.BITS.text(found)}" if score.BITS.key in found else "")
    )
    if _EXPORT.value:
        export.write(pathlib.Path(_EXPORT.value), run, state)
        print(f"wrote {_EXPORT.value}")


if __name__ == "__main__":
    command_line.run(main)
