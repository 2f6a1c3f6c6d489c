"""The two compiled functions of a run: one training step, one evaluation batch."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import rigl_optax
from rigl_optax.training.state import Sums, TrainState

PyTree = Any
Predicate = Callable[[jax.Array], jax.Array]


class Evaluation(NamedTuple):
    """Sums over the examples of a batch, each float32 scalar, by their weights."""

    loss: jax.Array
    correct: jax.Array
    examples: jax.Array


def make_train_step(
    graphdef: nnx.GraphDef,
    tx: optax.GradientTransformation,
    to_float: Callable[[jax.Array], jax.Array],
    needs_gradient_outside: Predicate | None,
    log_every: int,
) -> Callable[[TrainState, dict[str, Any]], TrainState]:
    """Compiles one step: gradients, update, running metrics. The state given is donated.

    Args:
      graphdef: The model's static part.
      tx: The optimizer.
      to_float: From the batch's integer images to what the model takes.
      needs_gradient_outside: Of the step (int32 scalar): whether this update grows weights by
        their gradient, and so should see some outside the masks. None for never.
      log_every: The metrics in the state are of the steps since the last multiple of this.

    Returns:
      A function of the state and a batch (`images` uint8 (batch, ...), `labels` int32
      (batch,)) to the next state.
    """

    def loss_fn(
        params: PyTree, model_state: PyTree, batch: dict[str, Any]
    ) -> tuple[jax.Array, tuple[jax.Array, PyTree]]:
        model = nnx.merge(graphdef, params, model_state)
        model.train()
        logits_BxC = model(to_float(batch["images"]))
        losses_B = optax.softmax_cross_entropy_with_integer_labels(logits_BxC, batch["labels"])
        new_state = nnx.to_pure_dict(nnx.state(model, nnx.Not(nnx.Param)))
        return losses_B.mean(), (logits_BxC, new_state)

    def train_step(state: TrainState, batch: dict[str, Any]) -> TrainState:
        (loss, (logits_BxC, model_state)), grads = jax.value_and_grad(loss_fn, has_aux=True)(
            state.params, state.model_state, batch
        )
        blind = jnp.zeros((), jnp.int32)
        if needs_gradient_outside is not None:
            blind = jax.lax.cond(
                needs_gradient_outside(state.step),
                lambda: _is_blind(grads, state.opt_state),
                lambda: jnp.zeros((), jnp.int32),
            )
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        examples = jnp.float32(len(batch["labels"]))
        correct = jnp.sum(logits_BxC.argmax(-1) == batch["labels"], dtype=jnp.float32)
        keep = state.step % log_every != 0
        sums = jax.tree.map(
            lambda old, new: jnp.where(keep, old, 0) + new,
            state.sums,
            Sums(examples, examples * loss, correct, blind),
        )
        return TrainState(state.step + 1, params, model_state, opt_state, sums, state.history)

    return jax.jit(train_step, donate_argnums=0)


def make_eval_step(
    graphdef: nnx.GraphDef, to_float: Callable[[jax.Array], jax.Array]
) -> Callable[[PyTree, PyTree, dict[str, Any]], Evaluation]:
    """Compiles the evaluation of one batch, which also has `weights` float32 (batch,)."""

    def eval_step(params: PyTree, model_state: PyTree, batch: dict[str, Any]) -> Evaluation:
        model = nnx.merge(graphdef, params, model_state)
        model.eval()
        logits_BxC = model(to_float(batch["images"]))
        losses_B = optax.softmax_cross_entropy_with_integer_labels(logits_BxC, batch["labels"])
        correct_B = (logits_BxC.argmax(-1) == batch["labels"]).astype(jnp.float32)
        weights_B = batch["weights"]
        return Evaluation(
            jnp.sum(losses_B * weights_B), jnp.sum(correct_B * weights_B), jnp.sum(weights_B)
        )

    return jax.jit(eval_step)


def _is_blind(grads: PyTree, opt_state: PyTree) -> jax.Array:
    """1 if the gradient is zero at every inactive weight of the network, else 0.

    Growth by gradient would then take the lowest indices. It happens when the forward pass
    multiplies by the masks itself, which makes the gradients as sparse as the weights. In one
    layer alone it is no sign of that: where few weights are inactive, they may all have
    gathered at units that are dead.
    """
    masks = rigl_optax.get_masks(opt_state)
    pairs = list(zip(jax.tree.leaves(masks), jax.tree.leaves(grads), strict=True))
    has_inactive = jnp.stack([jnp.any(~mask) for mask, _ in pairs])
    is_seen = jnp.stack([jnp.any(jnp.where(mask, 0, grad) != 0) for mask, grad in pairs])
    return (jnp.any(has_inactive) & ~jnp.any(is_seen)).astype(jnp.int32)
