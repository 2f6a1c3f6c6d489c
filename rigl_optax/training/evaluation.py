"""Measures loss and accuracy over a whole split, every example counted exactly once."""

from collections.abc import Callable
from typing import Any

import jax

from rigl_optax.training import step
from rigl_optax.training.setup import Run
from rigl_optax.training.state import TrainState

Evaluate = Callable[[TrainState, Any], dict[str, float]]


def evaluator(run: Run) -> Evaluate:
    """Compiles the evaluation of a run's model.

    Returns:
      A function of a state and a split to its mean `loss` (nats per label), the same in the units
      of the task, and `accuracy` (fraction of the labels).
    """
    config, placement, task = run.config, run.placement, run.task
    eval_step = step.make_eval_step(run)
    batch_size = placement.padded(config.eval.batch_size)
    rows = placement.rows(batch_size)

    def evaluate(state: TrainState, split: Any) -> dict[str, float]:
        kernels = run.representation.kernels(state)
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
