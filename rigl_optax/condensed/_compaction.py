"""Finds the True entries of a mask, in order: as `jnp.nonzero`, several times as fast.

`jnp.nonzero` adds up and scatters an entry for each entry of the mask. Here the mask becomes words
of 32 bits, and only words and results are added up and scattered.
"""

import jax
import jax.numpy as jnp
from jax import lax

_WORD = 32


def indices(mask: jax.Array, number: int) -> jax.Array:
    """Returns the indices of the first `number` True entries of a mask.

    Args:
      mask: Bool [n].
      number: How many, static.

    Returns:
      int32 [number], ascending. If there are fewer, arbitrary indices follow.

    Examples:
      >>> indices(jnp.array([False, True, True, False, True]), 3).tolist()
      [1, 2, 4]
    """
    (length,) = mask.shape
    if not length or not number:
        return jnp.zeros(number, jnp.int32)
    bits = jnp.pad(mask, (0, -length % _WORD)).reshape(-1, _WORD).astype(jnp.uint32)
    words = jnp.sum(bits << jnp.arange(_WORD, dtype=jnp.uint32), 1, dtype=jnp.uint32)
    counts = lax.population_count(words).astype(jnp.int32)
    ends = jnp.cumsum(counts, dtype=jnp.int32)
    # A result lies in the word whose index is the number of words that have ended by then. Results
    # that do not exist would lie behind the last word.
    ended = jnp.zeros(number + 1, jnp.int32).at[jnp.minimum(ends, number)].add(1)
    word = jnp.minimum(jnp.cumsum(ended, dtype=jnp.int32)[:number], words.shape[0] - 1)
    rank = jnp.arange(number, dtype=jnp.int32) - (ends - counts)[word]
    return jnp.minimum(word * _WORD + _place_of_bit(words[word], rank), length - 1)


def _place_of_bit(words: jax.Array, rank: jax.Array) -> jax.Array:
    """Returns the position of the set bit with `rank` set bits below it, by bisection."""
    place = jnp.zeros_like(rank)
    width = _WORD // 2
    while width:
        low = words & jnp.uint32((1 << width) - 1)
        below = lax.population_count(low).astype(jnp.int32)
        is_above = rank >= below
        place = place + jnp.where(is_above, width, 0)
        rank = rank - jnp.where(is_above, below, 0)
        words = jnp.where(is_above, words >> width, low)
        width //= 2
    return place
