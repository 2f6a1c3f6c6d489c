"""What a method remembers between calls: made at init, laid out as trees like params."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from rigl_optax import _layout, _paths
from rigl_optax._inner_state import Born, Kept
from rigl_optax._layout import Layout
from rigl_optax._method import Arrays, GrownState, Method
from rigl_optax._state import Memory

PyTree = Any

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
        packing = _layout.packing(layout.sparse)
        sparse_masks = layout.select(list(masks))
        pairs = zip(layout.sparse, sparse_masks, strict=True)
        started = method.start(layout, packing, [s.groups(m) for s, m in pairs])
        memory = memory._replace(carry=started.carry)
        if started.marks:
            each = zip(layout.sparse, started.marks, sparse_masks, strict=True)
            marks = [_placed(leaf.expand(x), like=m) for leaf, x, m in each]
            memory = memory._replace(marks=tree(layout, marks))
    if method.shadow is not None:
        shadow = copies()
    return memory, shadow


def _placed(x: jax.Array, like: jax.Array) -> jax.Array:
    if isinstance(x, jax.core.Tracer) or isinstance(like, jax.core.Tracer):
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
            return jnp.broadcast_to(average.astype(rest.dtype), rest.shape)
        if grown_state.gradient_scale:
            return (grown_state.gradient_scale * gradients[owner]).astype(rest.dtype)
        return rest

    return value
