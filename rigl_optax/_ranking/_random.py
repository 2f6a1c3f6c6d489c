"""Draws random numbers without state: the same on every host, after a restart, under any flag."""

import enum
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from rigl_optax import _numbers
from rigl_optax._ranking._packing import Packing, iota
from rigl_optax._types import Seed


class Purpose(enum.IntEnum):
    """The purpose of a draw, which is folded into its key.

    Without it the initial masks and the growth at count 0 would be the same draw, and nothing would
    grow.
    """

    INITIAL_MASK = 0
    GROWTH = 1
    NOISE = 2
    GROWN_VALUE = 3
    SIGN = 4
    CANDIDATE = 5


def check_seed(seed: Seed) -> None:
    """Raises unless `seed` is an integer in [0, 2**32), or a (traced) integer scalar."""
    if isinstance(seed, jax.Array):
        if seed.ndim or not jnp.issubdtype(seed.dtype, jnp.integer):
            raise TypeError(f"seed: must be an integer scalar, not {seed.dtype}{list(seed.shape)}")
    elif not 0 <= _numbers.integer("seed", seed) < 2**32:
        raise ValueError(f"seed={seed}: must be in [0, 2**32)")


def symmetric(scores: jax.Array) -> jax.Array:
    """Maps scores of `random_scores` to uniform float32 numbers in (-1, 1), without its ends."""
    # The upper 23 bits: float32 holds them and the added half exactly, so neither end is reached.
    return ((scores >> 8).astype(jnp.float32) + 0.5) / 2**22 - 1


def normal(scores: jax.Array) -> jax.Array:
    """Maps scores of `random_scores` to standard normal float32 numbers."""
    return jnp.float32(2**0.5) * lax.erf_inv(symmetric(scores))


def random_scores(
    seed: Seed,
    purpose: Purpose,
    positions: Sequence[int],
    packing: Packing,
    count: jax.Array | int = 0,
    indices: Sequence[jax.Array] | None = None,
) -> list[jax.Array]:
    """Draws uniform int32 scores in [0, 2**31) that depend on the arguments alone.

    The scores of a leaf are `jax.random.bits(key, leaf.shape, "uint32") >> 1` under
    `jax_threefry_partitionable`, with purpose, position and count folded into the key. They depend
    neither on how the leaves are laid out nor on JAX's flags (`tests/core/test_reproducible.py`).

    Args:
      seed: The method's seed, never the model's: masks and initial weights drawn from
        one key are not independent.
      purpose: What the scores are used for.
      positions: The position of each leaf among all leaves of params.
      packing: How the leaves are laid out.
      count: Number of calls of `update` before this one, an integer or an int32 scalar.
      indices: int32 arrays, laid out as `packing`: the flat index in the leaf of each entry that
        is to be drawn; None if all entries are there, in order.

    Returns:
      int32 arrays, laid out as `packing`; -1 where there is only padding.
    """
    # The same words as `jax.random.key(seed, impl="threefry2x32")`, but not affected by
    # `jax_random_seed_offset` and `jax_enable_x64`.
    low = seed.astype(jnp.uint32) if isinstance(seed, jax.Array) else np.uint32(seed)
    words = jnp.stack([jnp.zeros((), jnp.uint32), jnp.asarray(low)])
    key = jax.random.fold_in(jax.random.wrap_key_data(words, impl="threefry2x32"), int(purpose))

    from jax.extend.random import threefry2x32_p  # slow to import: it brings Pallas

    def leaf_key(position: jax.Array) -> jax.Array:
        return jax.random.key_data(jax.random.fold_in(jax.random.fold_in(key, position), count))

    keys = jax.vmap(leaf_key)(jnp.asarray(positions, jnp.uint32))  # [leaves, 2]
    leaf_of, first_of = packing.rankings()
    sizes = packing.sizes()
    scores = []
    for i, (ranking_ids, shape) in enumerate(
        zip(packing.ranking_ids, packing.packed_shapes(), strict=True)
    ):
        to_row = ranking_ids.ids.shape + (1,) * (len(shape) - ranking_ids.ids.ndim)
        within = np.asarray(ranking_ids.starts).reshape(to_row) + iota(shape, ranking_ids.ids.ndim)
        index = (
            within + first_of[ranking_ids.ids].reshape(to_row) if indices is None else indices[i]
        )
        # Straight to the primitive: `jax.random.bits` cannot draw some entries of a leaf alone, and
        # without `jax_threefry_partitionable` it draws other bits.
        row_keys = keys[leaf_of[ranking_ids.ids]]  # [*rows, 2]
        first, second = (
            jnp.broadcast_to(row_keys[..., word].reshape(to_row), shape) for word in range(2)
        )
        low_word = jnp.broadcast_to(index, shape).astype(jnp.uint32)
        bits = jnp.bitwise_xor(
            *threefry2x32_p.bind(first, second, jnp.zeros_like(low_word), low_word)
        )
        score = (bits >> 1).astype(jnp.int32)
        is_entry = within < sizes[ranking_ids.ids].reshape(to_row)
        scores.append(jnp.where(is_entry, score, -1) if packing.is_packed else score)
    return scores
