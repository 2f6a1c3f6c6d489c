"""Loss and accuracy over a whole split, every example counted exactly once."""

from collections.abc import Callable

import jax

from rigl_optax.data import batches
from rigl_optax.training import step
from rigl_optax.training.config import Config
from rigl_optax.training.setup import Run
from rigl_optax.training.state import TrainState

Evaluate = Callable[[TrainState, batches.Split], dict[str, float]]


def evaluator(config: Config, run: Run) -> Evaluate:
    """Compiles the evaluation of a run's model.

    Returns:
      A function of a state and a split to its mean `loss` (nats per example) and `accuracy`
      (fraction of the examples).
    """
    eval_step = step.make_eval_step(run.graphdef, run.to_float)

    def evaluate(state: TrainState, split: batches.Split) -> dict[str, float]:
        sums = [
            eval_step(state.params, state.model_state, batch)
            for batch in batches.evaluation_batches(split, config.eval_batch_size)
        ]
        loss, correct, examples = (
            sum(float(x) for x in column) for column in zip(*jax.device_get(sums), strict=True)
        )
        return {"loss": loss / examples, "accuracy": correct / examples}

    return evaluate
