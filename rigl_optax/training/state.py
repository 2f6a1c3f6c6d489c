"""Everything a run needs to go on, as one pytree of plain arrays."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import rigl_optax
from rigl_optax import _paths, condensed
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


class Entries(NamedTuple):
    """What one entry of a mask stands for: a weight, or the weights of a block.

    Attributes:
      weights: int32: how many weights; of the shape of the mask, or a scalar for all entries.
      inputs: int32 vector, or a scalar: inputs of the layer along the mask's last axis but one.
      outputs: int32 vector, or a scalar: outputs of the layer along its last axis.
    """

    weights: np.ndarray
    inputs: np.ndarray
    outputs: np.ndarray


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


def topologies(state: TrainState) -> dict[str, condensed.BlockTopology]:
    """Where the blocks of condensed kernels are; none if all are dense arrays."""
    is_condensed = isinstance(state.opt_state, condensed.CondensedState)
    return state.opt_state.topologies if is_condensed else {}


def kernels(state: TrainState) -> PyTree:
    """The parameters as the model multiplies by them."""
    return condensed.bind(state.params, topologies(state))


def masks(state: TrainState) -> PyTree:
    """Bool tree like params: what lives and dies, weights, or blocks of condensed kernels."""
    if not topologies(state):
        return rigl_optax.get_masks(state.opt_state)
    found = topologies(state)
    named = _paths.flatten_with_paths(state.params)
    leaves = [found[p].grid_mask() if p in found else jnp.ones(x.shape, bool) for p, x in named]
    return jax.tree.unflatten(jax.tree.structure(state.params), leaves)


def entries(state: TrainState) -> dict[str, Entries]:
    """`{path: what an entry of its mask stands for}`: counts of `masks` are then of weights."""
    one = np.ones((), np.int32)
    found = {path: Entries(one, one, one) for path, _ in _paths.flatten_with_paths(state.params)}
    for path, topology in topologies(state).items():
        sizes, (inputs, outputs) = topology.block.group_sizes, topology.shape[-2:]
        # Blocks at the edges may be smaller ones.
        each = sizes(topology.shape), sizes((inputs, 1))[:, 0], sizes((1, outputs))[0]
        found[path] = Entries(*(x.astype(np.int32) for x in each))
    return found


def count(mask: jax.Array, each: jax.typing.ArrayLike) -> jax.Array:
    """int32 scalar: the sum of `each`, how much an entry counts, over the entries that are True."""
    return jnp.sum(jnp.where(mask, each, 0), dtype=jnp.int32)


def weight_masks(state: TrainState) -> PyTree:
    """Bool tree like the dense parameters: for pictures and files, when a run is over."""
    if not topologies(state):
        return rigl_optax.get_masks(state.opt_state)
    return condensed.masks_of(state.params, topologies(state))


def sizes(state: TrainState) -> dict[str, int]:
    """`{path: number of weights}` of the dense network."""
    found = topologies(state)
    named = _paths.flatten_with_paths(state.params)
    return {p: math.prod(found[p].shape if p in found else leaf.shape) for p, leaf in named}


def skipped(state: TrainState) -> int:
    """Steps that the optimizer of condensed kernels has not seen, by which its schedule is late.

    Waits for the state. 0 for masked ones, which keep to their schedule themselves.
    """
    return int(state.step) - int(state.opt_state.count) if topologies(state) else 0


def outline(state: TrainState) -> TrainState:
    """What a run has to know of its first state: masks, or where blocks are, and all shapes.

    They are copies, so that the state itself may be donated; a byte a weight.
    """

    def shape(x: jax.Array) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)

    def kept(x: jax.Array) -> Any:
        is_exact = x.dtype == bool or jnp.issubdtype(x.dtype, jnp.integer)
        return x.copy() if is_exact else shape(x)

    opt_state = jax.tree.map(kept, state.opt_state)
    return jax.tree.map(shape, state)._replace(opt_state=opt_state)


def zero_sums() -> Sums:
    """Nothing seen yet."""
    return Sums(*(jnp.zeros((), dtype) for dtype in (jnp.float32,) * 3 + (jnp.int32,) * 2))


def create(
    make_model: Callable[[], nnx.Module],
    tx: optax.GradientTransformation | condensed.CondensedTransformation,
    placement: Placement,
    *,
    masked: bool,
    rewires: bool,
    choose: Callable[[PyTree], dict[str, condensed.BlockTopology]] | None = None,
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
      choose: If kernels are condensed: from dense parameters to where their first blocks are.

    Returns:
      The model's static part, for `nnx.merge(graphdef, params, model_state)`, and the state
      at step 0.
    """
    graphdef = nnx.graphdef(nnx.eval_shape(make_model))

    def initial() -> TrainState:
        params, model_state = nnx.state(make_model(), nnx.Param, ...)
        pure_params, pure_state = nnx.to_pure_dict(params), nnx.to_pure_dict(model_state)
        if isinstance(tx, condensed.CondensedTransformation):
            assert choose is not None
            found = choose(pure_params)
            pure_params = condensed.extract(pure_params, found)
            opt_state = tx.init(pure_params, found)
        else:
            opt_state = tx.init(pure_params)
            if masked:
                pure_params = rigl_optax.apply_masks(pure_params, opt_state)
        step = jnp.zeros((), jnp.int32)
        start = TrainState(step, pure_params, pure_state, opt_state, zero_sums(), None)
        return start._replace(history=_no_history(masks(start)) if rewires else None)

    return graphdef, placement.create(initial)


def _no_history(masks: PyTree) -> History:
    return History(jax.tree.map(jnp.copy, masks), jax.tree.map(jnp.zeros_like, masks))
