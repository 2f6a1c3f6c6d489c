"""Stateless randomness: the same on every host, after every restart, under any PRNG flag."""

import enum
import numbers
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

Seed = int | jax.Array


class Purpose(enum.IntEnum):
    """What a draw is for. Without it, masks and growth at count 0 would be the same draw."""

    INITIAL_MASK = 0
    GROWTH = 1
    NOISE = 2


def check_seed(seed: Seed) -> None:
    """Raises unless `seed` is an integer in [0, 2**32), or a (traced) integer scalar."""
    if isinstance(seed, jax.Array):
        if seed.ndim or not jnp.issubdtype(seed.dtype, jnp.integer):
            raise TypeError(f"seed: must be an integer scalar, not {seed.dtype}{list(seed.shape)}")
    elif isinstance(seed, bool) or not isinstance(seed, numbers.Integral):
        raise TypeError(f"seed={seed!r}: must be an integer")
    elif not 0 <= seed < 2**32:
        raise ValueError(f"seed={seed}: must be in [0, 2**32)")


def random_scores(
    seed: Seed,
    purpose: Purpose,
    leaves: Sequence[int],
    shapes: Sequence[tuple[int, ...]],
    count: jax.Array | int = 0,
) -> list[jax.Array]:
    """Uniform int32 scores in [0, 2**31), a function of the arguments alone.

    Args:
      seed: The method's seed, never the model's: masks and initial weights drawn from
        one key are not independent.
      purpose: What the scores are for.
      leaves: Index of each leaf in the tree of params.
      shapes: Shape of each leaf.
      count: Calls of `update` so far.

    Returns:
      An array for each leaf.
    """
    # The words of `jax.random.key(seed, impl="threefry2x32")`, whatever
    # `jax_random_seed_offset` and `jax_enable_x64` are.
    low = seed.astype(jnp.uint32) if isinstance(seed, jax.Array) else np.uint32(seed)
    words = jnp.stack([jnp.zeros((), jnp.uint32), jnp.asarray(low)])
    key = jax.random.wrap_key_data(words, impl="threefry2x32")
    key = jax.random.fold_in(key, int(purpose))
    # The flag decides which bits a sharded draw gives: ours don't depend on it.
    with jax.threefry_partitionable(True):
        keys = [jax.random.fold_in(jax.random.fold_in(key, leaf), count) for leaf in leaves]
        bits = [jax.random.bits(k, s, jnp.uint32) for k, s in zip(keys, shapes, strict=True)]
    return [(b >> 1).astype(jnp.int32) for b in bits]
