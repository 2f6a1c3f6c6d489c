"""Stateless randomness: the same on every host, after every restart, under any PRNG flag."""

import enum
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.random import threefry2x32_p

from rigl_optax import _numbers
from rigl_optax._ranking._packing import Packing, iota
from rigl_optax._types import Seed


class Purpose(enum.IntEnum):
    """What a draw is for. Without it, masks and growth at count 0 would be the same draw."""

    INITIAL_MASK = 0
    GROWTH = 1
    NOISE = 2
    GROWN_VALUE = 3
    SIGN = 4


def check_seed(seed: Seed) -> None:
    """Raises unless `seed` is an integer in [0, 2**32), or a (traced) integer scalar."""
    if isinstance(seed, jax.Array):
        if seed.ndim or not jnp.issubdtype(seed.dtype, jnp.integer):
            raise TypeError(f"seed: must be an integer scalar, not {seed.dtype}{list(seed.shape)}")
    elif not 0 <= _numbers.integer("seed", seed) < 2**32:
        raise ValueError(f"seed={seed}: must be in [0, 2**32)")


def symmetric(scores: jax.Array) -> jax.Array:
    """Uniform float32 in (-1, 1), both ends left out, of scores as `random_scores` has them."""
    return ((scores >> 8).astype(jnp.float32) + 0.5) / 2**22 - 1


def normal(scores: jax.Array) -> jax.Array:
    """Standard normal float32 of scores as `random_scores` has them."""
    return jnp.float32(2**0.5) * lax.erf_inv(symmetric(scores))


def random_scores(
    seed: Seed,
    purpose: Purpose,
    positions: Sequence[int],
    packing: Packing,
    count: jax.Array | int = 0,
    indices: Sequence[jax.Array] | None = None,
) -> list[jax.Array]:
    """Uniform int32 scores in [0, 2**31), a function of the arguments alone.

    The scores of a leaf are `jax.random.bits(key, leaf.shape, "uint32") >> 1` with the key
    folded with purpose, position and count, as under `jax_threefry_partitionable`; however
    the leaves are laid out, and under any flag.

    Args:
      seed: The method's seed, never the model's: masks and initial weights drawn from
        one key are not independent.
      purpose: What the scores are for.
      positions: Of each leaf, among all leaves of params.
      packing: How the leaves are laid out.
      count: Calls of `update` so far.
      indices: As `packing` lays them out, which entries of the leaves to draw, int32; None if
        all of them are there, in order.

    Returns:
      Arrays as `packing` has them; -1 where there is only padding.
    """
    # The words of `jax.random.key(seed, impl="threefry2x32")`, whatever
    # `jax_random_seed_offset` and `jax_enable_x64` are.
    low = seed.astype(jnp.uint32) if isinstance(seed, jax.Array) else np.uint32(seed)
    words = jnp.stack([jnp.zeros((), jnp.uint32), jnp.asarray(low)])
    key = jax.random.fold_in(jax.random.wrap_key_data(words, impl="threefry2x32"), int(purpose))

    def leaf_key(position: jax.Array) -> jax.Array:
        return jax.random.key_data(jax.random.fold_in(jax.random.fold_in(key, position), count))

    keys = jax.vmap(leaf_key)(jnp.asarray(positions, jnp.uint32))  # [leaves, 2]
    leaf_of, first_of = packing.rankings()
    sizes = packing.sizes()
    scores = []
    for i, (rows, shape) in enumerate(zip(packing.rows, packing.packed_shapes(), strict=True)):
        to_row = rows.ids.shape + (1,) * (len(shape) - rows.ids.ndim)
        within = np.asarray(rows.starts).reshape(to_row) + iota(shape, rows.ids.ndim)
        index = within + first_of[rows.ids].reshape(to_row) if indices is None else indices[i]
        row_keys = keys[leaf_of[rows.ids]]  # [*rows, 2]
        first, second = (
            jnp.broadcast_to(row_keys[..., word].reshape(to_row), shape) for word in range(2)
        )
        low_word = jnp.broadcast_to(index, shape).astype(jnp.uint32)
        bits = jnp.bitwise_xor(
            *threefry2x32_p.bind(first, second, jnp.zeros_like(low_word), low_word)
        )
        score = (bits >> 1).astype(jnp.int32)
        is_entry = within < sizes[rows.ids].reshape(to_row)
        scores.append(jnp.where(is_entry, score, -1) if packing.is_packed else score)
    return scores
