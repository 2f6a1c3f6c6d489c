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
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from rigl_optax import _paths
from rigl_optax._types import PyTree
from rigl_optax._xla import _blend

# Computes the optimizer state of newly grown weights:
# newborn_state(key path, old value, value at rest, owner) -> array.
NewbornState: TypeAlias = Callable[[_paths.KeyPath, jax.Array, jax.Array, int], jax.Array]


class Kept(NamedTuple):
    """Where a weight was active and stays active.

    Two masks, selected by in turn: their conjunction would be one more array in memory.
    """

    old: jax.Array
    new: jax.Array

    def select(
        self, on_kept: jax.Array, elsewhere: jax.Array, on_grown: jax.Array | None = None
    ) -> jax.Array:
        """Selects values of weights that are kept, of those that are new, and of all others."""
        new = elsewhere if on_grown is None else _blend.select(self.new, on_grown, elsewhere)
        return _blend.select(self.old, _blend.select(self.new, on_kept, elsewhere), new)


def owners(state: PyTree, params: PyTree) -> list[int | None]:
    """Finds for each leaf of `state` the index of the leaf of `params` it belongs to, if any."""
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
    """Finds the trees in a state that have a leaf for each weight, or a hole in its place.

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


class Slot(NamedTuple):
    """A leaf of the inner state that belongs to a weight, at a step that may be a rewiring.

    Attributes:
      path: Its key path in the state.
      owner: Index of the weight among the leaves of params.
      kept: Its value where a rewiring that replaces the gradient step keeps the weight: the one
        before the step. A leaf of integers counts steps, as counters that belong to no
        weight do: these go on, so it is the one after the step.
      new: Its value after the step.
      rest: Its value in a fresh `inner.init`: "at rest" is not zero for every optimizer.
    """

    path: _paths.KeyPath
    owner: int
    kept: jax.Array
    new: jax.Array
    rest: jax.Array


def slots(old: PyTree, new: PyTree, rest: PyTree, params: PyTree) -> dict[int, Slot]:
    """Finds the leaves of the inner state that a rewiring changes.

    All other leaves (counters, hyperparameters, factored statistics) take the new value
    always, so that schedules stay aligned with the loop.

    Args:
      old: State before `inner.update`.
      new: State after it.
      rest: A fresh `inner.init`.
      params: The parameters, for their paths and shapes.

    Returns:
      `{index among the leaves of new: slot}`.
    """
    # By path, since a state may change its structure: a leaf that was not there is new.
    olds, rests = (dict(jax.tree_util.tree_leaves_with_path(tree)) for tree in (old, rest))
    leaves = jax.tree_util.tree_leaves_with_path(new)
    found = {}
    for index, ((path, leaf), owner) in enumerate(zip(leaves, owners(new, params), strict=True)):
        if owner is None or path not in olds or path not in rests:
            continue
        kept, resting = (jnp.asarray(x[path]).astype(leaf.dtype) for x in (olds, rests))
        if _counts(leaf):
            kept = leaf
        found[index] = Slot(path, owner, kept, leaf, resting)
    return found


def stored_leaves(
    slots: Mapping[int, Slot],
    kept: Sequence[Kept | None],
    is_rewiring: jax.Array,
    has_failed: jax.Array,
    *,
    replaces_step: bool,
    newborn_state: NewbornState | None = None,
    starts_anew: jax.Array | None = None,
) -> dict[int, jax.Array]:
    """Computes what is stored of the slots after a step that may be a rewiring.

    On an ordinary step they are new. On a rewiring step a slot is at rest where its weight does
    not stay active; where it does, it keeps its old value if there is no gradient step.

    Args:
      slots: From `slots`.
      kept: For each leaf of params, where it was and stays active; None for dense leaves.
      is_rewiring: Bool scalar: whether masks may have changed.
      has_failed: Bool scalar: whether the rewiring failed, and nothing moves.
      replaces_step: Whether there is no gradient step on any rewiring step, failed or not.
      newborn_state: What new weights start from, if not from rest.
      starts_anew: Bool scalar: whether the rewiring, unless it fails, puts all slots at rest, those
        of dense leaves too.

    Returns:
      `{index: value}`, for `replace_leaves`.
    """
    stored = {}
    for index, slot in slots.items():
        value = slot.kept
        if not replaces_step:
            value = lax.select(has_failed, value, slot.new)
        where = kept[slot.owner]
        if where is not None:
            newborn = None
            if newborn_state is not None and not _counts(slot.new):
                newborn = newborn_state(slot.path, slot.kept, slot.rest, slot.owner)
            value = where.select(value, slot.rest, newborn)
        if starts_anew is not None:
            value = lax.select(starts_anew & ~has_failed, slot.rest, value)
        stored[index] = lax.select(is_rewiring, value, slot.new)
    return stored


def _counts(leaf: jax.Array) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.integer)


def replace_leaves(tree: PyTree, by_index: Mapping[int, jax.Array]) -> PyTree:
    """Returns `tree` with some of its leaves replaced."""
    leaves, treedef = jax.tree.flatten(tree)
    return jax.tree.unflatten(treedef, [by_index.get(i, leaf) for i, leaf in enumerate(leaves)])
