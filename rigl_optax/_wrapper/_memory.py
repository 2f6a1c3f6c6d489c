"""What a method remembers between calls: made at init, laid out as trees like params."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from rigl_optax import _layout, _paths
from rigl_optax._layout import Layout
from rigl_optax._state import Memory
from rigl_optax._types import Arrays, PyTree
from rigl_optax._wrapper._inner_state import Born, Kept
from rigl_optax._wrapper._method import GrownState, Method, Start, Started
from rigl_optax._xla import _sharding

# What Optax and its relatives call an average of squared gradients.
_SECOND_MOMENTS = {"nu", "nu_max", "sum_of_squares"}


def tree(layout: Layout, sparse_leaves: Sequence[Any]) -> PyTree:
    """A tree like params with these for its sparse leaves, and nothing for dense ones."""
    leaves: list[Any] = [optax.MaskedNode()] * len(layout.leaves)
    for leaf, value in zip(layout.sparse, sparse_leaves, strict=True):
        leaves[leaf.position] = value
    return layout.treedef.unflatten(leaves)


def leaves(memory: PyTree) -> Arrays:
    """The sparse leaves of what `tree` made, in tree order."""
    return jax.tree.leaves(memory)


def start(method: Method, layout: Layout, masks: Sequence[jax.Array]) -> tuple[Memory, PyTree]:
    """What a method remembers at init, and its shadow; trees without leaves for most.

    Of shapes instead of arrays, copies of the weights are zeros.
    """
    memory = Memory()
    shadow: PyTree = ()
    sparse = layout.select(layout.leaves)
    if not sparse:
        return memory, shadow

    def copies() -> PyTree:
        return tree(
            layout,
            [
                jnp.zeros_like(x)
                if isinstance(x, jax.ShapeDtypeStruct)
                else jnp.array(x, copy=True)
                for x in sparse
            ],
        )

    if method.remember is not None:
        zeros = [jnp.zeros_like(x, jnp.float32) for x in sparse]
        memory = memory._replace(gradients=tree(layout, zeros))
    if method.keeps_initial:
        memory = memory._replace(initial=copies())
    if method.start is not None:
        sparse_masks = layout.select(list(masks))
        started = _started(method.start, layout, sparse_masks)
        memory = memory._replace(carry=started.carry)
        if started.marks:
            pairs = zip(started.marks, sparse_masks, strict=True)
            memory = memory._replace(marks=tree(layout, [_placed(x, like=m) for x, m in pairs]))
    if method.shadow is not None:
        shadow = copies()
    return memory, shadow


def _started(start: Start, layout: Layout, masks: Arrays) -> Started:
    """What a method starts from; in parts, if the masks are: never whole on one device."""
    packing = _layout.packing(layout.sparse)

    def make(leaves: list[Any], masks: Arrays) -> Started:
        groups = [leaf.groups(m) for leaf, m in zip(layout.sparse, masks, strict=True)]
        started = start(layout._replace(leaves=leaves), packing, groups)
        # None, or one for each leaf.
        marks = zip(layout.sparse, started.marks, strict=bool(started.marks))
        return started._replace(marks=[leaf.expand(x) for leaf, x in marks])

    here = [*layout.leaves, *masks]
    is_traced = any(isinstance(x, jax.core.Tracer | jax.ShapeDtypeStruct) for x in here)
    if is_traced or all(len(mask.sharding.device_set) == 1 for mask in masks):
        return make(layout.leaves, masks)
    shapes = jax.eval_shape(make, layout.leaves, masks)
    marks: list[Any] = [mask.sharding for mask, _ in zip(masks, shapes.marks, strict=False)]
    return jax.jit(make, out_shardings=Started(marks, None))(layout.leaves, masks)


def _placed(x: jax.Array, like: jax.Array) -> jax.Array:
    if isinstance(x, jax.core.Tracer) or isinstance(like, jax.core.Tracer):
        return x
    if not like.committed:  # where nobody said: free to move, as the weights are
        return x
    return jax.device_put(x, like.sharding)


def born(
    grown_state: GrownState,
    layout: Layout,
    gradients: Sequence[jax.Array],
    kept: Sequence[Kept | None],
    is_rewiring: jax.Array,
) -> Born:
    """What the optimizer state of new weights starts from, as `GrownState` says."""
    stacked = {leaf.position for leaf in layout.sparse if leaf.stacked}

    def value(path: _paths.KeyPath, old: jax.Array, rest: jax.Array, owner: int) -> jax.Array:
        where = kept[owner]
        names = {getattr(key, "name", None) for key in path}
        if where is not None and grown_state.mean_second_moment and names & _SECOND_MOMENTS:
            shape = (old.shape[0], *(1,) * (old.ndim - 1)) if owner in stacked else (1,) * old.ndim
            axes = tuple(range(owner in stacked, old.ndim))

            def mean() -> jax.Array:
                stays = where.old & where.new
                total = jnp.sum(jnp.where(stays, old, 0), axes, jnp.float32).reshape(shape)
                count = jnp.sum(stays, axes, jnp.float32).reshape(shape)
                return total / jnp.maximum(count, 1)

            # Under a cond: an ordinary step has no use for it.
            average = lax.cond(is_rewiring, mean, lambda: jnp.zeros(shape, jnp.float32))
            return _sharding.like(jnp.broadcast_to(average.astype(rest.dtype), rest.shape), rest)
        if grown_state.gradient_scale:
            return (grown_state.gradient_scale * gradients[owner]).astype(rest.dtype)
        return rest

    return value
