"""Measures how masks change in training: churn, overlap, coverage, survival.

Masks are trees of bool arrays, as `get_masks` returns them. All functions are jitted and use only
elementwise operations and sums, so they are cheap and gather no sharded mask.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from rigl_optax import _masks, _paths
from rigl_optax._types import PyTree
from rigl_optax.analysis import _counts


class PerLayer(NamedTuple):
    """A fraction of all layers together, and of each layer.

    Attributes:
      total: float32 scalar, without layers that have no inactive weight (dense ones).
      layers: `{path: float32 scalar}` of all leaves.
    """

    total: jax.Array
    layers: dict[str, jax.Array]


@jax.jit
def churn(before: PyTree, after: PyTree) -> PerLayer:
    """Returns the fraction of active weights that a rewiring, or a span of training, dropped.

    Use it to see whether a dynamic method still changes its masks. If the number of active weights
    is constant, it is also the fraction of weights that are new.

    Args:
      before: Masks at first.
      after: Masks later.

    Returns:
      `1 - overlap(after, before)`.

    Raises:
      ValueError: If the masks are not those of the same parameters.

    Examples:
      >>> old, new = {"w": jnp.array([True, True, False])}, {"w": jnp.array([True, False, True])}
      >>> float(churn(old, new).total)
      0.5
    """
    old, new = _pair(before, after)
    return _fractions({path: _counts.churn(old[path], new[path]) for path in old}, old, if_none=0)


@jax.jit
def overlap(masks: PyTree, initial: PyTree) -> PerLayer:
    """Returns the fraction of the weights active in `initial` that are active in `masks`.

    Use it to see how far a run has moved from its initial masks, or how alike two runs are.

    Args:
      masks: Masks of now.
      initial: Masks to compare with.

    Returns:
      The fractions; 1 for a layer in which `initial` has no active weight.

    Raises:
      ValueError: If the masks are not those of the same parameters.
    """
    now, first = _pair(masks, initial)
    return _fractions({path: _counts.overlap(now[path], first[path]) for path in now}, first)


@jax.jit
def explore(explored: PyTree, masks: PyTree) -> PyTree:
    """Adds the active weights to those that have ever been active, for `coverage`.

    Args:
      explored: Masks of the weights that have been active so far; at first the initial masks.
      masks: Masks of now.

    Returns:
      A tree of masks: True where either is.

    Raises:
      ValueError: If the masks are not those of the same parameters.
    """
    ever, now = _pair(explored, masks)
    return _paths.map_with_names(lambda path, _: ever[path] | now[path], _detailed(explored, masks))


@jax.jit
def coverage(explored: PyTree, masks: PyTree) -> PerLayer:
    """Returns the fraction of weights that have ever been active (ITOP's exploration rate Rs).

    Use it to see whether a dynamic method explores enough.

    Args:
      explored: Masks accumulated by `explore` after every rewiring.
      masks: Masks of now, which show which layers are dense.

    Returns:
      The fractions, of all weights of a layer.

    Raises:
      ValueError: If the masks are not those of the same parameters.

    References:
      Liu et al., [Do We Actually Need Dense
      Over-Parameterization?](https://arxiv.org/abs/2102.02887), 2021.
    """
    named, now = _pair(explored, masks)
    return _fractions({path: _counts.coverage(mask) for path, mask in named.items()}, now)


@jax.jit
def grown(before: PyTree, after: PyTree) -> PyTree:
    """Returns masks of the weights that a rewiring has grown, for `survival`.

    Args:
      before: Masks before the rewiring.
      after: Masks after it.

    Raises:
      ValueError: If the masks are not those of the same parameters.
    """
    old, new = _pair(before, after)
    return _paths.map_with_names(lambda path, _: new[path] & ~old[path], _detailed(before, after))


@jax.jit
def survival(grown: PyTree, masks: PyTree) -> PerLayer:
    """Returns the fraction of the weights grown by an earlier rewiring that are still active.

    Use it to see whether new weights stay, or are dropped again soon.

    Args:
      grown: Masks from `grown`, at an earlier rewiring.
      masks: Masks of now.

    Returns:
      The fractions; 1 for a layer in which no weight had grown.

    Raises:
      ValueError: If the masks are not those of the same parameters.
    """
    return overlap(masks, grown)


def _detailed(first: PyTree, second: PyTree) -> PyTree:
    """Returns the tree structure with the most detail: a scalar may stand for a dense subtree."""
    (ones, one), (others, other) = (_paths.split(tree) for tree in (first, second))
    if jax.tree_util.treedef_is_leaf(one) or _paths.is_hole(first):
        return second
    if jax.tree_util.treedef_is_leaf(other) or _paths.is_hole(second):
        return first
    if one != other:
        return max(first, second, key=lambda tree: len(jax.tree.leaves(tree)))
    return one.unflatten([_detailed(x, y) for (_, x), (_, y) in zip(ones, others, strict=True)])


def _pair(first: PyTree, second: PyTree) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Returns two trees of masks by path, with equal shapes.

    Raises:
      ValueError: If the masks are not those of the same parameters.
    """
    # A scalar True may stand for a whole dense subtree: only the paths of leaves below count.
    named = [path for tree in (first, second) for path, _ in _paths.flatten_with_paths(tree)]
    above = {path[:i] for path in named for i, letter in enumerate(path) if letter == "/"}
    paths = [path for path in dict.fromkeys(named) if path not in above]
    trees = [_masks.over_paths(tree, paths) for tree in (first, second)]
    shapes = {}
    for path in paths:
        found = {tree[path].shape for tree in trees if tree[path] is not None}
        if len(found) > 1:
            raise ValueError(
                f"masks of {path!r} do not fit each other: their shapes are "
                f"{' and '.join(map(str, sorted(found)))}"
            )
        shapes[path] = found.pop() if found else ()
    full = [
        {p: jnp.ones(shapes[p], bool) if m is None else jnp.asarray(m) for p, m in tree.items()}
        for tree in trees
    ]
    return full[0], full[1]


def _fractions(
    counts: dict[str, _counts.Counts], dense_where_full: dict[str, jax.Array], if_none: float = 1
) -> PerLayer:
    """Divides the part by the whole, per layer and in total.

    The total leaves out layers whose mask in `dense_where_full` is all True.

    Args:
      counts: `{path: (part, whole)}`.
      dense_where_full: `{path: mask}`.
      if_none: The fraction where the whole is 0.
    """
    layers, part, whole = {}, jnp.float32(0), jnp.float32(0)
    for path, each in counts.items():
        n, of = (x.astype(jnp.float32) for x in each)
        layers[path] = jnp.where(of > 0, n / jnp.maximum(of, 1), if_none)
        # A factor of 0 or 1: under jit the masks are traced, so a layer cannot be left out.
        counted = 1 - jnp.all(dense_where_full[path]).astype(jnp.float32)
        part, whole = part + counted * n, whole + counted * of
    return PerLayer(jnp.where(whole > 0, part / jnp.maximum(whole, 1), if_none), layers)
