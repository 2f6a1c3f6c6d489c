"""Measures how the topology moves: churn, overlap, coverage, survival. Masks in, fractions out.

Masks are trees of bool arrays, as `get_masks` returns them. All functions are jitted and made of
elementwise operations and sums only: cheap, and without gathering on sharded masks.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from rigl_optax import _masks, _paths
from rigl_optax._types import PyTree
from rigl_optax.analysis import _counts


class PerLayer(NamedTuple):
    """A fraction for all layers together, and for each.

    Attributes:
      total: float32 scalar. Layers with nothing inactive (dense ones) are left out.
      layers: `{path: float32 scalar}`, of all leaves.
    """

    total: jax.Array
    layers: dict[str, jax.Array]


@jax.jit
def churn(before: PyTree, after: PyTree) -> PerLayer:
    """Measures the fraction of weights active before that are not active after.

    With a constant number of active weights it is also the fraction that is new. 0 where no weight
    was active before.

    Raises:
      ValueError: If the trees differ.

    Example:
      >>> old, new = {"w": jnp.array([True, True, False])}, {"w": jnp.array([True, False, True])}
      >>> float(churn(old, new).total)
      0.5
    """
    old, new = _pair(before, after)
    return _fractions({path: _counts.churn(old[path], new[path]) for path in old}, old, if_none=0)


@jax.jit
def overlap(masks: PyTree, initial: PyTree) -> PerLayer:
    """The fraction of the weights active in `initial` that are active in `masks` (again).

    1 where `initial` has no active weight.

    Raises:
      ValueError: If the trees differ.
    """
    now, first = _pair(masks, initial)
    return _fractions({path: _counts.overlap(now[path], first[path]) for path in now}, first)


@jax.jit
def explore(explored: PyTree, masks: PyTree) -> PyTree:
    """Adds what is active now to what has ever been: start from the initial masks."""
    ever, now = _pair(explored, masks)
    return _paths.map_with_names(lambda path, _: ever[path] | now[path], _detailed(explored, masks))


@jax.jit
def coverage(explored: PyTree, masks: PyTree) -> PerLayer:
    """The fraction of weights that have ever been active (ITOP's exploration rate Rs).

    Args:
      explored: Masks accumulated by `explore` at every rewiring.
      masks: Active now: they tell which layers are dense.

    References:
      Liu et al., `Do We Actually Need Dense Over-Parameterization?
      <https://arxiv.org/abs/2102.02887>`_, 2021.
    """
    named, now = _pair(explored, masks)
    return _fractions({path: _counts.coverage(mask) for path, mask in named.items()}, now)


@jax.jit
def grown(before: PyTree, after: PyTree) -> PyTree:
    """Masks of the weights that a rewiring has grown."""
    old, new = _pair(before, after)
    return _paths.map_with_names(lambda path, _: new[path] & ~old[path], _detailed(before, after))


@jax.jit
def survival(grown: PyTree, masks: PyTree) -> PerLayer:
    """The fraction of weights once grown that are active now; 1 where none had grown.

    Args:
      grown: From `grown`, at a rewiring in the past.
      masks: Active now.
    """
    return overlap(masks, grown)


def _detailed(first: PyTree, second: PyTree) -> PyTree:
    """Of two trees of masks the larger at each place: a scalar may stand for a dense subtree."""
    (ones, one), (others, other) = (_paths.split(tree) for tree in (first, second))
    if jax.tree_util.treedef_is_leaf(one) or _paths.is_hole(first):
        return second
    if jax.tree_util.treedef_is_leaf(other) or _paths.is_hole(second):
        return first
    if one != other:
        return max(first, second, key=lambda tree: len(jax.tree.leaves(tree)))
    return one.unflatten([_detailed(x, y) for (_, x), (_, y) in zip(ones, others, strict=True)])


def _pair(first: PyTree, second: PyTree) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Masks by path, with equal shapes.

    Raises:
      ValueError: If they are not of the same parameters.
    """
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
    """Divides parts by wholes, for each layer and over all that are not full.

    Args:
      counts: Of each layer.
      dense_where_full: Masks; the layers where they are True everywhere are not in the total.
      if_none: The fraction where the whole is 0.
    """
    layers, part, whole = {}, jnp.float32(0), jnp.float32(0)
    for path, each in counts.items():
        n, of = (x.astype(jnp.float32) for x in each)
        layers[path] = jnp.where(of > 0, n / jnp.maximum(of, 1), if_none)
        counted = 1 - jnp.all(dense_where_full[path]).astype(jnp.float32)
        part, whole = part + counted * n, whole + counted * of
    return PerLayer(jnp.where(whole > 0, part / jnp.maximum(whole, 1), if_none), layers)
