"""How the topology moves: churn, overlap, coverage, survival. Masks in, fractions out.

Masks are trees of bool arrays, as `get_masks` returns them. All functions are jitted and made of
elementwise operations and sums only: cheap, and without gathering on sharded masks.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rigl_optax import _paths

PyTree = Any


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
    """The fraction of weights active before that are not active after.

    With a constant number of active weights also the fraction that is new.

    Raises:
      ValueError: If the trees differ.

    Example:
      >>> old, new = {"w": jnp.array([True, True, False])}, {"w": jnp.array([True, False, True])}
      >>> float(churn(old, new).total)
      0.5
    """
    kept = overlap(after, before)
    return jax.tree.map(lambda x: 1 - x, kept)


@jax.jit
def overlap(masks: PyTree, initial: PyTree) -> PerLayer:
    """The fraction of the weights active in `initial` that are active in `masks` (again).

    1 where `initial` has no active weight.

    Raises:
      ValueError: If the trees differ.
    """
    first = dict(_paths.flatten_with_paths(initial))
    now = dict(_paths.flatten_with_paths(masks))
    if list(now) != list(first) or any(now[path].shape != first[path].shape for path in now):
        raise ValueError(
            f"masks of {_paths.listing(list(now))} and of {_paths.listing(list(first))} do not fit"
        )
    return _fractions({path: (now[path] & first[path], first[path]) for path in now}, first)


@jax.jit
def explore(explored: PyTree, masks: PyTree) -> PyTree:
    """Adds what is active now to what has ever been: start from the initial masks."""
    return jax.tree.map(jnp.logical_or, explored, masks)


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
    named = dict(_paths.flatten_with_paths(explored))
    now = dict(_paths.flatten_with_paths(masks))
    return _fractions({path: (m, jnp.ones_like(m)) for path, m in named.items()}, now)


@jax.jit
def grown(before: PyTree, after: PyTree) -> PyTree:
    """Masks of the weights that a rewiring has grown."""
    return jax.tree.map(lambda old, new: new & ~old, before, after)


@jax.jit
def survival(grown: PyTree, masks: PyTree) -> PerLayer:
    """The fraction of weights once grown that are active now; 1 where none had grown.

    Args:
      grown: From `grown`, at a rewiring in the past.
      masks: Active now.
    """
    return overlap(masks, grown)


def _fractions(
    pairs: dict[str, tuple[jax.Array, jax.Array]], dense_where_full: dict[str, jax.Array]
) -> PerLayer:
    """Counts of the first over counts of the second; a total over layers that are not full."""
    layers, part, whole = {}, jnp.float32(0), jnp.float32(0)
    for path, (some, all_) in pairs.items():
        n, of = (jnp.count_nonzero(m).astype(jnp.float32) for m in (some, all_))
        layers[path] = jnp.where(of > 0, n / jnp.maximum(of, 1), 1)
        counts = 1 - jnp.all(dense_where_full[path]).astype(jnp.float32)
        part, whole = part + counts * n, whole + counts * of
    return PerLayer(jnp.where(whole > 0, part / jnp.maximum(whole, 1), 1), layers)
