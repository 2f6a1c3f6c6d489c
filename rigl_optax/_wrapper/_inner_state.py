"""Which leaves of an inner optimizer's state belong to which weight, and their reset.

Momentum, second moments, averages and the like mirror the tree of params somewhere
below: subtrees with the key paths of all weights, or holes (`optax.MaskedNode`, None) in
place of those that a wrapper keeps from an optimizer. A leaf of the state belongs to a weight
if it sits at the weight's place in such a mirror and has its shape. The end of its path alone
does not decide: a counter may be called as a weight is. Keys are compared with their type:
Adam's attribute `mu` is not a parameter in a dict under the key "mu". This needs nothing from
the optimizer, so it holds for every one that keeps a slot for each weight; statistics of
another shape (factored, flattened) belong to nobody and are left alone.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from rigl_optax import _paths
from rigl_optax._types import PyTree
from rigl_optax._xla import _blend

# From a leaf's key path, its old value, its value at rest and the index of its owner to
# what an entry starts from that has just grown.
Born = Callable[[_paths.KeyPath, jax.Array, jax.Array, int], jax.Array]


class Kept(NamedTuple):
    """Where a weight was active and stays active.

    Two masks, selected by in turn: their conjunction would be one more array in memory.
    """

    old: jax.Array
    new: jax.Array

    def select(
        self, on_kept: jax.Array, elsewhere: jax.Array, on_grown: jax.Array | None = None
    ) -> jax.Array:
        """`on_kept` where the weight is kept, `on_grown` where it is new, else `elsewhere`."""
        new = elsewhere if on_grown is None else _blend.select(self.new, on_grown, elsewhere)
        return _blend.select(self.old, _blend.select(self.new, on_kept, elsewhere), new)


def owners(state: PyTree, params: PyTree) -> list[int | None]:
    """For each leaf of `state`, the index of the leaf of `params` it belongs to, if any."""
    weights = {
        path: (index, tuple(np.shape(leaf)))
        for index, (path, leaf) in enumerate(_paths.leaves_with_path(params))
    }
    found = _paths.leaves_with_path(state, _paths.is_hole)
    mirrors = _mirrors(found, {path: shape for path, (_, shape) in weights.items()})

    def owner(path: _paths.KeyPath, leaf: Any) -> int | None:
        shape = getattr(leaf, "shape", None)
        if shape is None or jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return None
        for start in range(len(path) + 1):
            if path[:start] in mirrors and path[start:] in weights:
                index, expected = weights[path[start:]]
                return index if expected == tuple(shape) else None
        return None

    return [owner(path, leaf) for path, leaf in found if not _paths.is_hole(leaf)]


def _mirrors(
    state: Sequence[tuple[_paths.KeyPath, Any]],
    weights: Mapping[_paths.KeyPath, tuple[int, ...]],
) -> set[_paths.KeyPath]:
    """Where in a state there are trees with a leaf for each weight, or a hole in its place.

    A tree that has fewer weights and no holes, as an optimizer of some of them may make, is a
    mirror if all of its leaves have their weights' shapes, and are not all scalars.

    Args:
      state: Key paths of its leaves and holes, and what is there.
      weights: Key paths of the weights, and their shapes.
    """
    below: dict[_paths.KeyPath, list[tuple[_paths.KeyPath, Any]]] = {}
    for path, node in state:
        for start in range(len(path) + 1):
            below.setdefault(path[:start], []).append((path[start:], node))

    def is_mirror(entries: Sequence[tuple[_paths.KeyPath, Any]]) -> bool:
        shapes = {path: np.shape(node) for path, node in entries if not _paths.is_hole(node)}
        if not shapes or not shapes.keys() <= weights.keys():
            return False
        holes = {path for path, node in entries if _paths.is_hole(node)}
        if all(
            path in shapes or any(path[:end] in holes for end in range(len(path) + 1))
            for path in weights
        ):
            return True
        return all(weights[path] == shape for path, shape in shapes.items()) and any(
            shapes.values()
        )

    return {prefix for prefix, entries in below.items() if is_mirror(entries)}


def held_leaves(
    old: PyTree,
    new: PyTree,
    rest: PyTree,
    params: PyTree,
    kept: Sequence[Kept | None],
    is_rewiring: jax.Array,
    is_held: jax.Array,
    born: Born | None = None,
) -> dict[int, jax.Array]:
    """The leaves of the inner state that a rewiring changes, after a step that may be one.

    On an ordinary step they are as in `new`. On a rewiring step, what belongs to a weight
    is at rest where the weight does not stay active; where it does, it keeps its old value if
    the rewiring replaces the gradient step. All other leaves (counters, hyperparameters,
    factored statistics) take the new value always, so that schedules stay aligned.

    Args:
      old: State before `inner.update`.
      new: State after it.
      rest: A fresh `inner.init`: "at rest" is not zero for every optimizer.
      params: The parameters, for their paths and shapes.
      kept: For each leaf of params, where it was and stays active; None for dense leaves.
      is_rewiring: Bool scalar: whether masks may have changed.
      is_held: Bool scalar: whether there is no gradient step; `is_rewiring` itself if a
        rewiring always replaces it.
      born: What new weights start from, if not from rest.

    Returns:
      By index among the leaves of `new`, the value to store.
    """
    # By path, since a state may change its structure: a leaf that was not there is new.
    olds, rests = (dict(jax.tree_util.tree_leaves_with_path(tree)) for tree in (old, rest))
    leaves = jax.tree_util.tree_leaves_with_path(new)
    held = {}
    for index, ((path, leaf), owner) in enumerate(zip(leaves, owners(new, params), strict=True)):
        if owner is None or path not in olds or path not in rests:
            continue
        value = jnp.asarray(olds[path]).astype(leaf.dtype)
        if is_held is not is_rewiring:
            value = lax.select(is_held, value, leaf)
        where = kept[owner]
        if where is not None:
            resting = jnp.asarray(rests[path]).astype(leaf.dtype)
            grown = None if born is None else born(path, olds[path], resting, owner)
            value = where.select(value, resting, grown)
        held[index] = lax.select(is_rewiring, value, leaf)
    return held


def replace_leaves(tree: PyTree, by_index: dict[int, jax.Array]) -> PyTree:
    """`tree` with some of its leaves replaced."""
    leaves, treedef = jax.tree.flatten(tree)
    return jax.tree.unflatten(treedef, [by_index.get(i, leaf) for i, leaf in enumerate(leaves)])
