"""Compiles the two functions of a run: one training step, one evaluation batch."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from rigl_optax.training import losses, recovery
from rigl_optax.training.setup import Run
from rigl_optax.training.state import Sums, TrainState

PyTree = Any
TrainStep = Callable[[TrainState, dict[str, Any]], TrainState]


class Evaluation(NamedTuple):
    """Sums over the examples of a batch, each float32 scalar, by their weights."""

    loss: jax.Array
    correct: jax.Array
    examples: jax.Array


def make_train_step(run: Run, *, skips: bool = False, rewires: bool = False) -> TrainStep:
    """Compiles one step: gradients, update, running metrics. The state given is donated.

    Args:
      run: The run.
      skips: Whether a step that leads to a loss or a weight that is not finite changes nothing but
        counters. The step itself is the same program, so that what it leads to is the same bit
        for bit; there are two states in memory while one of them is chosen.
      rewires: Whether this is the program of rewirings, where the representation has one.

    Returns:
      A function of the state, without its history, and a batch from `run.placement.put` to the
      next state.
    """
    placement, representation = run.placement, run.representation
    is_growing = run.rewirings.growth_predicate
    log_every, label_smoothing = run.config.log.every, run.config.loss.label_smoothing

    def loss_fn(
        params: PyTree, probes: PyTree, state: TrainState, batch: dict[str, Any]
    ) -> tuple[jax.Array, tuple[jax.Array, PyTree]]:
        kernels = representation.bind(params, state, probes)
        model_state = placement.gather(state.model_state)
        model = nnx.merge(run.graphdef, placement.gather(kernels), model_state)
        model.train()
        logits_BxC = model(*run.task.inputs(batch))
        losses_B = losses.cross_entropy(logits_BxC, batch["labels"], label_smoothing)
        new_state = nnx.to_pure_dict(nnx.state(model, nnx.Not(nnx.Param)))
        return losses_B.mean(), (logits_BxC, new_state)

    def train_step(state: TrainState, batch: dict[str, Any]) -> TrainState:
        probes = representation.probes(state) if rewires and is_growing is not None else None
        gradient = jax.value_and_grad(loss_fn, (0, 1), has_aux=True)
        (loss, (logits_BxC, model_state)), (grads, scores) = gradient(
            state.params, probes, state, batch
        )
        unseeing = jnp.zeros((), jnp.int32)
        if is_growing is not None:
            unseeing = representation.grows_unseeing(grads, scores, state, is_growing)
        params, opt_state = representation.update(run.tx, grads, scores, state, rewires=rewires)
        examples = jnp.float32(batch["labels"].size)
        correct = jnp.sum(logits_BxC.argmax(-1) == batch["labels"], dtype=jnp.float32)
        keep = state.step % log_every != 0
        new = Sums(examples, examples * loss, correct, unseeing, jnp.zeros((), jnp.int32))
        sums = jax.tree.map(lambda old, add: jnp.where(keep, old, 0) + add, state.sums, new)
        return TrainState(state.step + 1, params, model_state, opt_state, sums, None)

    shardings = placement.of(run.abstract._replace(history=None))
    if not skips:
        return placement.compile(train_step, donate_argnums=0, out_shardings=shardings)

    def choose(before: TrainState, after: TrainState) -> TrainState:
        is_good = recovery.all_finite((after.sums.loss, after.params))
        keep = before.step % log_every != 0
        sums = jax.tree.map(lambda x: jnp.where(keep, x, 0), before.sums)
        sums = sums._replace(skipped=sums.skipped + 1)
        left = before._replace(step=after.step, sums=sums)
        return jax.tree.map(lambda new, old: jnp.where(is_good, new, old), after, left)

    take = placement.compile(train_step, out_shardings=shardings)
    chosen = placement.compile(choose, donate_argnums=1, out_shardings=shardings)
    return lambda state, batch: chosen(state, take(state, batch))


def make_eval_step(
    run: Run,
) -> Callable[[PyTree, PyTree, dict[str, Any]], tuple[Evaluation, PyTree]]:
    """Compiles the evaluation of one batch, which also has `weights`, float32 like the labels.

    Returns:
      A function of the kernels that the representation returns, model state and batch; it returns
      the model state for the next.
    """
    placement = run.placement

    def eval_step(
        kernels: PyTree, model_state: PyTree, batch: dict[str, Any]
    ) -> tuple[Evaluation, PyTree]:
        model = nnx.merge(run.graphdef, placement.gather(kernels), placement.gather(model_state))
        model.eval()
        logits_BxC = model(*run.task.inputs(batch))
        losses_B = losses.cross_entropy(logits_BxC, batch["labels"])
        correct_B = (logits_BxC.argmax(-1) == batch["labels"]).astype(jnp.float32)
        weights_B = batch["weights"]
        sums = (jnp.sum(losses_B * weights_B), jnp.sum(correct_B * weights_B), jnp.sum(weights_B))
        return Evaluation(*sums), nnx.to_pure_dict(nnx.state(model, nnx.Not(nnx.Param)))

    return placement.compile(eval_step)
