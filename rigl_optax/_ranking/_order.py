"""Puts the positions of a layer in a random order, one position at a time and both ways.

A sample is the first positions of the order. What stores few weights lists them, in time that is
linear in their number; what has an entry for every position asks of each for its rank. Both get the
same sample.

The order is a Feistel network: a position is a pair (i, j) on a grid that is hardly larger than the
layer, and rounds add a hash of i to j, and of j to i, in turns. A pair outside of the layer goes
through the rounds again.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from rigl_optax._ranking import _random
from rigl_optax._ranking._packing import Packing, iota
from rigl_optax._types import Arrays, Seed

_ROUNDS = 8


def ranks(
    seed: Seed,
    purpose: _random.Purpose,
    positions: Sequence[int],
    packing: Packing,
    sizes: np.ndarray,
    count: jax.Array | int,
    indices: Sequence[jax.Array] | None = None,
) -> Arrays:
    """Returns the rank of each position in the random order of its ranking.

    Args:
      seed: As in `random_scores`, and so `purpose`, `positions`, `packing` and `count`.
      purpose: What the order is for.
      positions: Of the leaves.
      packing: How the leaves are laid out.
      sizes: int [rankings]: how many positions each has.
      count: Of calls of `update`.
      indices: int32 arrays, laid out as `packing`: the position of each entry in its ranking; None
        if all are there.

    Returns:
      int32 arrays laid out as `packing`; the size of the ranking for what is outside of it.
    """
    keys = _round_keys(seed, purpose, positions, count)
    leaf_of, _ = packing.rankings()
    firsts = np.cumsum([0, *packing.rankings_per_leaf])
    found = []
    rows = zip(packing.ranking_ids, packing.packed_shapes(), strict=True)
    for number, (ranking_ids, shape) in enumerate(rows):
        ids = ranking_ids.ids
        to_row = ids.shape + (1,) * (len(shape) - ids.ndim)
        within = np.asarray(ranking_ids.starts).reshape(to_row) + iota(shape, ids.ndim)
        at = within if indices is None else indices[number]
        size = jnp.asarray(sizes[ids], jnp.int32).reshape(to_row)
        leaf = leaf_of[ids]
        own = jnp.asarray(ids - firsts[leaf], jnp.uint32).reshape(to_row)
        row_keys = keys[leaf].reshape(*to_row, _ROUNDS)
        rank = _walk(jnp.broadcast_to(at, shape), size, row_keys, own, way=-1)
        found.append(jnp.where(at < size, rank, size))
    return found


def first(
    seed: Seed,
    purpose: _random.Purpose,
    position: int,
    count: jax.Array | int,
    size: int,
    number: int,
) -> jax.Array:
    """Returns the first positions of the random order of a layer that is a whole leaf.

    Args:
      seed: As in `ranks`, and so `purpose` and `count`.
      purpose: What the order is for.
      position: Of the leaf.
      count: Of calls of `update`.
      size: How many positions there are.
      number: How many are wanted, static.

    Returns:
      int32 [number]: all different, in that order.
    """
    keys = _round_keys(seed, purpose, [position], count)[0]
    rank = jnp.arange(number, dtype=jnp.int32)
    return _walk(rank, jnp.int32(size), keys, jnp.uint32(0), way=1)


def _round_keys(
    seed: Seed, purpose: _random.Purpose, positions: Sequence[int], count: jax.Array | int
) -> jax.Array:
    """Draws a key for each round of each leaf, uint32 [leaves, rounds]."""
    first, second = _random.keys(seed, purpose, positions, count)
    rounds = np.arange(_ROUNDS, dtype=np.uint32)
    return jnp.asarray(_random.bits(first[:, None], second[:, None], rounds))


def _walk(
    x: jax.Array,
    size: jax.Array,
    keys: jax.Array,
    own: jax.Array,
    way: int,
) -> jax.Array:
    """Permutes numbers below `size`, forward (1) or back (-1); none leaves that range."""
    # The grid has at least `size` places, and hardly more.
    width = jnp.ceil(jnp.sqrt(size.astype(jnp.float32))).astype(jnp.int32)
    width = jnp.maximum(width, 1)
    height = jnp.maximum(-(-size // width), 1)

    def through(x: jax.Array) -> jax.Array:
        i, j = _permute(x // width, x % width, height, width, keys, own, way)
        return i * width + j

    x = through(jnp.where(x < size, x, 0))
    return lax.while_loop(
        lambda x: jnp.any(x >= size), lambda x: jnp.where(x >= size, through(x), x), x
    )


def _permute(
    i: jax.Array,
    j: jax.Array,
    height: jax.Array,
    width: jax.Array,
    keys: jax.Array,
    own: jax.Array,
    way: int,
) -> tuple[jax.Array, jax.Array]:
    """Does the rounds in order, or undoes them from the last one; `way` is 1 or -1."""
    for r in range(_ROUNDS)[::way]:
        # Half of a pair stays as it is, so that the same hash can be taken away again.
        if r % 2:
            i = (i + way * _hash(j, keys[..., r], own, height)) % height
        else:
            j = (j + way * _hash(i, keys[..., r], own, width)) % width
    return i, j


def _hash(x: jax.Array, key: jax.Array, own: jax.Array, bound: jax.Array) -> jax.Array:
    """Hashes x to [0, bound): the finaliser of MurmurHash3 on what is mixed with the key."""
    h = x.astype(jnp.uint32) * jnp.uint32(0x9E3779B1) ^ own * jnp.uint32(0xC2B2AE3D) ^ key
    h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
    h = h ^ (h >> 16)
    return (h % bound.astype(jnp.uint32)).astype(jnp.int32)
