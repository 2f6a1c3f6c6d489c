"""Everything a run needs to go on, as one pytree of plain arrays."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import rigl_optax
from rigl_optax.training.mesh import Placement

PyTree = Any


class Sums(NamedTuple):
    """Training metrics added up since they were last logged.

    They are a part of the state so that a resumed run logs what an uninterrupted one would.

    Attributes:
      examples: float32 scalar, examples seen.
      loss: float32 scalar, their losses.
      correct: float32 scalar, how many were classified correctly.
      blind: int32 scalar, rewirings that saw no gradient outside the masks.
      skipped: int32 scalar, steps left out since something was not finite.
    """

    examples: jax.Array
    loss: jax.Array
    correct: jax.Array
    blind: jax.Array
    skipped: jax.Array


class History(NamedTuple):
    """What is remembered of earlier masks, from rewiring to rewiring.

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
      params: The model's parameters, a nested dict of arrays.
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


def zero_sums() -> Sums:
    """Nothing seen yet."""
    return Sums(*(jnp.zeros((), dtype) for dtype in (jnp.float32,) * 3 + (jnp.int32,) * 2))


def create(
    make_model: Callable[[], nnx.Module],
    tx: optax.GradientTransformation,
    placement: Placement,
    *,
    masked: bool,
    rewires: bool,
) -> tuple[nnx.GraphDef, TrainState]:
    """Splits a model once; from here on all is pure pytrees.

    Weights, masks and optimizer state are made by one compiled function, each part where it is
    to be.

    Args:
      make_model: Makes a freshly initialised model.
      tx: The optimizer.
      placement: Where the state is to be.
      masked: Whether `tx` holds masks; they are applied to the initial weights.
      rewires: Whether it changes them: then their history is kept.

    Returns:
      The model's static part, for `nnx.merge(graphdef, params, model_state)`, and the state
      at step 0.
    """
    graphdef = nnx.graphdef(nnx.eval_shape(make_model))

    def initial() -> TrainState:
        params, model_state = nnx.state(make_model(), nnx.Param, ...)
        pure_params, pure_state = nnx.to_pure_dict(params), nnx.to_pure_dict(model_state)
        opt_state = tx.init(pure_params)
        if masked:
            pure_params = rigl_optax.apply_masks(pure_params, opt_state)
        history = _no_history(rigl_optax.get_masks(opt_state)) if rewires else None
        step = jnp.zeros((), jnp.int32)
        return TrainState(step, pure_params, pure_state, opt_state, zero_sums(), history)

    return graphdef, placement.create(initial)


def _no_history(masks: PyTree) -> History:
    return History(jax.tree.map(jnp.copy, masks), jax.tree.map(jnp.zeros_like, masks))
