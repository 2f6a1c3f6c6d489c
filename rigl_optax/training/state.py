"""Everything a run needs to go on, as one pytree of plain arrays."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from rigl_optax.analysis._counts import count as count
from rigl_optax.training.representation import Representation

PyTree = Any


class Sums(NamedTuple):
    """Training metrics added up since they were last logged.

    They are a part of the state so that a resumed run logs what an uninterrupted one would.

    Attributes:
      examples: float32 scalar, examples seen.
      loss: float32 scalar, their losses.
      correct: float32 scalar, examples classified correctly.
      unseeing: int32 scalar, rewirings that saw no gradient outside the masks.
      skipped: int32 scalar, steps skipped since something was not finite.
    """

    examples: jax.Array
    loss: jax.Array
    correct: jax.Array
    unseeing: jax.Array
    skipped: jax.Array


class History(NamedTuple):
    """Masks that record what earlier rewirings did.

    In the state, so that a resumed run measures what an uninterrupted one would.

    Attributes:
      explored: Bool tree like the masks: weights that have ever been active.
      grown: Bool tree like the masks: weights that the last rewiring made active.
    """

    explored: PyTree
    grown: PyTree


class TrainState(NamedTuple):
    """The state of a run; checkpoints hold this and nothing else.

    Attributes:
      step: int32 scalar, updates done.
      params: The model's parameters, a nested dict of arrays; of a condensed kernel its blocks.
      model_state: What else the model carries (batch statistics, ...), a nested dict.
      opt_state: The optimizer's state, masks included.
      sums: Metrics since the last record.
      history: Of the masks; None if they are never rewired.
    """

    step: jax.Array
    params: PyTree
    model_state: PyTree
    opt_state: PyTree
    sums: Sums
    history: History | None


def outline(state: TrainState) -> TrainState:
    """Returns what a run has to know of its first state: masks, or where blocks are, and shapes.

    The masks are copies, so that the state itself may be donated; they take a byte a weight.
    """

    def shape(x: jax.Array) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)

    def kept(x: jax.Array) -> Any:
        is_exact = x.dtype == bool or jnp.issubdtype(x.dtype, jnp.integer)
        return x.copy() if is_exact else shape(x)

    opt_state = jax.tree.map(kept, state.opt_state)
    return jax.tree.map(shape, state)._replace(opt_state=opt_state)


def zero_sums() -> Sums:
    """Returns sums of no steps."""
    return Sums(*(jnp.zeros((), dtype) for dtype in (jnp.float32,) * 3 + (jnp.int32,) * 2))


def start(
    make_model: Callable[[], nnx.Module], tx: Any, representation: Representation, *, rewires: bool
) -> TrainState:
    """Makes the state at step 0; to be traced, so that weights, masks and the rest are one program.

    The model is split once: from here on all is pure pytrees.

    Args:
      make_model: Makes a freshly initialised model.
      tx: The optimizer.
      representation: How sparse kernels are held.
      rewires: Whether masks change: then their history is kept.
    """
    params, model_state = nnx.state(make_model(), nnx.Param, ...)
    pure_params, pure_state = nnx.to_pure_dict(params), nnx.to_pure_dict(model_state)
    pure_params, opt_state = representation.start(tx, pure_params)
    step = jnp.zeros((), jnp.int32)
    made = TrainState(step, pure_params, pure_state, opt_state, zero_sums(), None)
    return made._replace(history=_no_history(representation.masks(made)) if rewires else None)


def _no_history(masks: PyTree) -> History:
    return History(jax.tree.map(jnp.copy, masks), jax.tree.map(jnp.zeros_like, masks))
