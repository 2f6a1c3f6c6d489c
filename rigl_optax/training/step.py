"""The two compiled functions of a run: one training step, one evaluation batch."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import rigl_optax
from rigl_optax import condensed
from rigl_optax.training import losses, recovery
from rigl_optax.training import state as state_lib
from rigl_optax.training.setup import Run
from rigl_optax.training.state import Sums, TrainState

PyTree = Any
Predicate = Callable[[jax.Array], jax.Array]
TrainStep = Callable[[TrainState, dict[str, Any]], TrainState]


class Evaluation(NamedTuple):
    """Sums over the examples of a batch, each float32 scalar, by their weights."""

    loss: jax.Array
    correct: jax.Array
    examples: jax.Array


def make_train_step(
    run: Run,
    needs_gradient_outside: Predicate | None,
    log_every: int,
    *,
    label_smoothing: float = 0.0,
    skips: bool = False,
    rewires: bool = False,
) -> TrainStep:
    """Compiles one step: gradients, update, running metrics. The state given is donated.

    Args:
      run: What it is made of.
      needs_gradient_outside: Of the step (int32 scalar): whether this update grows weights by
        their gradient, and so should see some outside the masks. None for never.
      log_every: The metrics in the state are of the steps since the last multiple of this.
      label_smoothing: Of the loss.
      skips: Whether a step that leads to a loss or a weight that is not finite changes nothing but
        counters. The step itself is the same program, so that what it leads to is the same bit
        for bit; there are two states in memory while one of them is chosen.
      rewires: Of condensed kernels, whether this is the program of rewirings; that of masked ones
        does both.

    Returns:
      A function of the state, without its history, and a batch from `run.placement.put` to the
      next state.
    """
    placement = run.placement

    def loss_fn(
        params: PyTree, probes: PyTree, state: TrainState, batch: dict[str, Any]
    ) -> tuple[jax.Array, tuple[jax.Array, PyTree]]:
        kernels = condensed.bind(params, state_lib.topologies(state), probes)
        model_state = placement.gather(state.model_state)
        model = nnx.merge(run.graphdef, placement.gather(kernels), model_state)
        model.train()
        logits_BxC = model(*run.task.inputs(batch))
        losses_B = losses.cross_entropy(logits_BxC, batch["labels"], label_smoothing)
        new_state = nnx.to_pure_dict(nnx.state(model, nnx.Not(nnx.Param)))
        return losses_B.mean(), (logits_BxC, new_state)

    def train_step(state: TrainState, batch: dict[str, Any]) -> TrainState:
        topologies = state_lib.topologies(state)
        needs_scores = rewires and bool(topologies) and needs_gradient_outside is not None
        probes = condensed.probes(topologies) if needs_scores else None
        gradient = jax.value_and_grad(loss_fn, (0, 1), has_aux=True)
        (loss, (logits_BxC, model_state)), (grads, scores) = gradient(
            state.params, probes, state, batch
        )
        blind = jnp.zeros((), jnp.int32)
        if needs_scores:
            blind = _is_blind({path: t.grid_mask() for path, t in topologies.items()}, scores)
        elif needs_gradient_outside is not None and not topologies:
            blind = jax.lax.cond(
                needs_gradient_outside(state.step),
                lambda: _is_blind(rigl_optax.get_masks(state.opt_state), grads),
                lambda: jnp.zeros((), jnp.int32),
            )
        if isinstance(run.tx, condensed.CondensedTransformation) and rewires:
            scores = scores if needs_scores else condensed.probes(topologies)
            params, opt_state = run.tx.rewire(grads, scores, state.opt_state, state.params)
        else:
            updates, opt_state = run.tx.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
        examples = jnp.float32(batch["labels"].size)
        correct = jnp.sum(logits_BxC.argmax(-1) == batch["labels"], dtype=jnp.float32)
        keep = state.step % log_every != 0
        new = Sums(examples, examples * loss, correct, blind, jnp.zeros((), jnp.int32))
        sums = jax.tree.map(lambda old, add: jnp.where(keep, old, 0) + add, state.sums, new)
        return TrainState(state.step + 1, params, model_state, opt_state, sums, None)

    shardings = placement.of(run.initial._replace(history=None))
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
      A function of `state.kernels`, model state and batch; it returns the model state for the next.
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


def _is_blind(masks: PyTree, grads: PyTree) -> jax.Array:
    """1 if the gradient is zero at every inactive weight, or block, of the network, else 0.

    Growth by gradient would then take the lowest indices. It happens when the forward pass
    multiplies by the masks itself, which makes the gradients as sparse as the weights. In one
    layer alone it is no sign of that: where few weights are inactive, they may all have
    gathered at units that are dead.
    """
    pairs = list(zip(jax.tree.leaves(masks), jax.tree.leaves(grads), strict=True))
    has_inactive = jnp.stack([jnp.any(~mask) for mask, _ in pairs])
    is_seen = jnp.stack([jnp.any(jnp.where(mask, 0, grad) != 0) for mask, grad in pairs])
    return (jnp.any(has_inactive) & ~jnp.any(is_seen)).astype(jnp.int32)
