"""Loss and accuracy of a checkpoint over a whole split, every example counted exactly once."""

import pathlib
from collections.abc import Callable
from typing import Any

import jax

from rigl_optax.training import checkpoints, metrics, step
from rigl_optax.training import state as state_lib
from rigl_optax.training.config import Config
from rigl_optax.training.setup import Run
from rigl_optax.training.state import TrainState

NEWEST, BEST = "newest", "best"
Evaluate = Callable[[TrainState, Any], dict[str, float]]


def restore(
    workdir: pathlib.Path,
    config: Config,
    run: Run,
    which: str = NEWEST,
    say: Callable[[str], None] = print,
) -> TrainState:
    """The state in a checkpoint of a run, which may be training.

    Args:
      workdir: Of the run.
      config: Of the run.
      run: From `setup.prepare`.
      which: `newest`, the newest that can be read; `best`, on the validation split; or a step.
      say: Told about each checkpoint that had to be passed over.

    Raises:
      ValueError: If there is no such checkpoint, or it cannot be read; it lists those there are.
    """
    if not (workdir / "checkpoints").exists():
        raise ValueError(f"{workdir} has no checkpoint yet")
    with checkpoints.read_checkpoints(workdir) as saved:
        steps = [checkpoint.step for checkpoint in saved.checkpoints]
        step: int | None = None
        if which == BEST:
            key = run.task.score.key
            measured = metrics.recorded(metrics.read(workdir / metrics.FILE), "validation", key)
            ranks = {done: run.task.score.rank({key: value}) for done, value in measured.items()}
            step = checkpoints.best(steps, ranks)
        elif which.isdecimal():
            step = int(which)
        if which != NEWEST and step not in steps:
            raise ValueError(
                f"--step={which}: must be {NEWEST}, {BEST} (if there are validation records) or a "
                f"step of the checkpoints, which are {steps}"
            )
        state = checkpoints.restore_newest(saved, run.initial, say, config, until=step)
    if state is None:
        raise ValueError(f"{workdir} has no checkpoint yet")
    if step is not None and int(state.step) != step:
        raise ValueError(f"--step={which}: checkpoint {step} cannot be read")
    return state


def evaluator(config: Config, run: Run) -> Evaluate:
    """Compiles the evaluation of a run's model.

    Returns:
      A function of a state and a split to its mean `loss` (nats per label), the same in the units
      of the task, and `accuracy` (fraction of the labels).
    """
    placement, task = run.placement, run.task
    eval_step = step.make_eval_step(run)
    batch_size = placement.padded(config.eval.batch_size)
    rows = placement.rows(batch_size)

    def evaluate(state: TrainState, split: Any) -> dict[str, float]:
        kernels = state_lib.kernels(state)
        sums, model_state = [], task.at_rest(state.model_state, batch_size)
        for batch in task.evaluation_batches(config, split, batch_size, rows):
            found, model_state = eval_step(kernels, model_state, placement.put(batch))
            sums.append(found)
        loss, correct, examples = (
            sum(float(x) for x in column) for column in zip(*jax.device_get(sums), strict=True)
        )
        nats = loss / examples
        units = {name: nats / size for name, size in task.units.items()}
        return {"loss": nats, **units, "accuracy": correct / examples}

    return evaluate
