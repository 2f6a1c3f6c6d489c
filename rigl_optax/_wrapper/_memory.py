"""The memory of a method between calls: made at init, laid out as trees like params."""

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
from rigl_optax._wrapper._inner_state import Kept, NewbornState
from rigl_optax._wrapper._method import GrownState, InitialMemory, Method, Start
from rigl_optax._xla import _sharding

# Names of averages of squared gradients in the states of Optax and its relatives.
_SECOND_MOMENTS = {"nu", "nu_max", "sum_of_squares"}


def tree(layout: Layout, sparse_leaves: Sequence[Any]) -> PyTree:
    """Makes a tree like params with these for its sparse leaves, and nothing for dense ones."""
    leaves: list[Any] = [optax.MaskedNode()] * len(layout.leaves)
    for leaf, value in zip(layout.sparse, sparse_leaves, strict=True):
        leaves[leaf.position] = value
    return layout.treedef.unflatten(leaves)


def leaves(memory: PyTree) -> Arrays:
    """Returns the sparse leaves of what `tree` made, in tree order."""
    return jax.tree.leaves(memory)


def start(method: Method, layout: Layout, masks: Sequence[jax.Array]) -> tuple[Memory, PyTree]:
    """Makes what a method remembers, and its shadow; trees without leaves for most methods.

    Where weights are only shapes, copies of them are zeros.
    """
    memory = Memory()
    shadow: PyTree = ()
    sparse = layout.select(layout.leaves)
    if not sparse:
        return memory, shadow

    def copied(leaves: Sequence[Any]) -> list[Any]:
        return [
            jnp.zeros_like(x) if isinstance(x, jax.ShapeDtypeStruct) else jnp.array(x, copy=True)
            for x in leaves
        ]

    def copies() -> PyTree:
        return tree(layout, copied(sparse))

    if method.remember is not None:
        zeros = [jnp.zeros_like(x, jnp.float32) for x in sparse]
        memory = memory._replace(gradients=tree(layout, zeros))
    if method.keeps_initial:
        memory = memory._replace(initial=copies())
    if method.snapshot is not None:
        memory = memory._replace(snapshot=layout.treedef.unflatten(copied(layout.leaves)))
    if method.start is not None:
        sparse_masks = layout.select(list(masks))
        started = _started(method.start, layout, sparse_masks)
        memory = memory._replace(numbers=started.numbers)
        if started.second_masks:
            pairs = zip(started.second_masks, sparse_masks, strict=True)
            second_masks = [_placed(x, like=mask) for x, mask in pairs]
            memory = memory._replace(second_masks=tree(layout, second_masks))
    if method.shadow is not None and method.shadow.stored:
        shadow = copies()
    return memory, shadow


def taken(is_taken: jax.Array, params: PyTree, snapshot: PyTree) -> PyTree:
    """Returns the snapshot, or the parameters in its place.

    Under a cond: otherwise every step would read and write both.
    """
    return lax.cond(is_taken, lambda new, old: new, lambda new, old: old, params, snapshot)


def _started(start: Start, layout: Layout, masks: Arrays) -> InitialMemory:
    """Calls `start`; second masks are made in parts, if the masks are: never whole on a device."""
    packing = _layout.packing(layout.sparse)

    def make(leaves: list[Any], masks: Arrays) -> InitialMemory:
        groups = [leaf.groups(m) for leaf, m in zip(layout.sparse, masks, strict=True)]
        started = start(layout._replace(leaves=leaves), packing, groups)
        # None, or one for each leaf.
        each = zip(layout.sparse, started.second_masks, strict=bool(started.second_masks))
        return started._replace(second_masks=[leaf.expand(x) for leaf, x in each])

    here = [*layout.leaves, *masks]
    is_traced = any(isinstance(x, jax.core.Tracer | jax.ShapeDtypeStruct) for x in here)
    if is_traced or all(len(mask.sharding.device_set) == 1 for mask in masks):
        return make(layout.leaves, masks)
    shapes = jax.eval_shape(make, layout.leaves, masks)
    pairs = zip(masks, shapes.second_masks, strict=False)
    shardings: list[Any] = [mask.sharding for mask, _ in pairs]
    return jax.jit(make, out_shardings=InitialMemory(shardings, None))(layout.leaves, masks)


def _placed(x: jax.Array, like: jax.Array) -> jax.Array:
    if isinstance(x, jax.core.Tracer) or isinstance(like, jax.core.Tracer):
        return x
    if not like.committed:  # where nobody said: free to move, as the weights are
        return x
    return jax.device_put(x, like.sharding)


def newborn_state(
    grown_state: GrownState,
    layout: Layout,
    gradients: Sequence[jax.Array],
    kept: Sequence[Kept | None],
    is_rewiring: jax.Array,
) -> NewbornState:
    """Makes the function that computes the optimizer state of newly grown weights."""
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
