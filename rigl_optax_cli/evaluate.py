"""Evaluates a checkpoint of a run; and hands over its weights and masks.

    rigl-optax evaluate --workdir=runs/digits --split=validation
    rigl-optax evaluate --workdir=runs/digits --step=best --export=digits.safetensors

On the CPU, so that a run that is training keeps its accelerator; JAX_PLATFORMS=cuda in the
environment uses one. `rigl_optax.export.read` reads the file; docs/deploy.md describes it.
"""

import pathlib
from collections.abc import Sequence

from absl import flags

from rigl_optax import training
from rigl_optax.training import evaluation, export, score
from rigl_optax_cli import command_line

_SPLITS = ["train", "validation", "test"]


def main(argv: Sequence[str]) -> int:
    """Runs `rigl-optax evaluate`; returns the exit status."""
    return command_line.run(_evaluate, argv, __doc__, _define)


def _define(values: flags.FlagValues) -> None:
    command_line.define_workdir(values)
    flags.DEFINE_enum("split", "test", _SPLITS, "What to evaluate on.", values)
    command_line.define_step(values)
    flags.DEFINE_string("export", None, "A file for weights and masks, .safetensors.", values)


def _evaluate(values: flags.FlagValues) -> None:
    command_line.use_cpu()
    if values.export and pathlib.Path(values.export).suffix != export.SUFFIX:
        raise ValueError(f"--export={values.export}: must end in {export.SUFFIX}")
    run, state = training.load(values.workdir, values.step)
    found = evaluation.evaluator(run)(state, getattr(run.dataset, values.split))
    print(
        f"step {int(state.step)}  {values.split}  loss {found['loss']:.4f}  "
        f"accuracy {100 * found['accuracy']:.2f} %"
        + (f"  {score.BITS.text(found)}" if score.BITS.key in found else "")
    )
    if values.export:
        export.write(pathlib.Path(values.export), run, state)
        print(f"wrote {values.export}")
