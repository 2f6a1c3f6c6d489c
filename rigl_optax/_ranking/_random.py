"""Draws random numbers without state: the same on every host, after a restart, under any flag."""

import enum
from collections.abc import Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from rigl_optax import _numbers
from rigl_optax._ranking import _scores
from rigl_optax._ranking._packing import Packing, iota
from rigl_optax._types import Seed

# The keys of all leaves: first words and second words, uint32 [leaves].
Keys: TypeAlias = tuple[Any, Any]


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
    REMOVAL = 6


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


def gumbel(scores: jax.Array) -> jax.Array:
    r"""Maps scores of `random_scores` to Gumbel noise, to base 2 and in units of 1 / 4,096.

    The largest of $\log_2 w_i + g_i$ is entry i with a probability in proportion to $w_i$; the k
    largest are a sample without replacement. In integers, so that it is the same in every program:
    $g = -\log_2 e$ of an exponential number $e = -\ln(1 - v)$, with v in [0, 1) from the scores.
    Below 1/2, $e / v$ is a polynomial in v; its error changes weights by at most 0.1 %.

    Args:
      scores: int32 in [0, 2**31).

    Returns:
      int32: from -5 to 31 times 4,096.
    """
    one = _scores.LOG_BITS
    scores = jnp.maximum(scores, 1)
    is_small = scores < (1 << 30)
    rest = jnp.where(is_small, scores, (np.int32(2**31 - 1) - scores) + 1)
    log = (31 << one) - _scores.log2(rest)  # of 1 / v, or of 1 / (1 - v)
    v = jnp.where(is_small, scores, 0) >> 18  # in units of 2**-13
    bend = (v * (2984 + (v * (908 + (v * 1671 >> 13)) >> 13))) >> 13
    # ln 2 = 2**(-2166 / 4096).
    large = (one << one) + 2166 - _scores.log2(jnp.maximum(log, 1))
    return jnp.where(is_small, log - bend, large)


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
    return draw(keys(seed, purpose, positions, count), packing, indices)


def keys(
    seed: Seed, purpose: Purpose, positions: Sequence[int], count: jax.Array | int = 0
) -> Keys:
    """Folds purpose, positions and count into the key of a seed; arguments as of `random_scores`.

    Returns:
      A key for each leaf: two uint32 arrays [leaves], of NumPy if seed and count are integers.
    """
    # The words of `jax.random.key(seed, impl="threefry2x32")`, but not affected by
    # `jax_random_seed_offset` and `jax_enable_x64`. Each line is a `jax.random.fold_in`.
    words = np.zeros(1, np.uint32), _word(seed)
    words = _threefry(*words, _word(int(purpose)))
    words = _threefry(*words, np.asarray(positions, np.uint32))
    return _threefry(*words, _word(count))


def draw(
    keys: Keys, packing: Packing, indices: Sequence[jax.Array] | None = None
) -> list[jax.Array]:
    """Draws the scores of `random_scores` with finished keys, which may be traced."""
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
        first, second = (word[leaf_of[ranking_ids.ids]].reshape(to_row) for word in keys)
        drawn = bits(first, second, index.astype(jnp.uint32))
        score = jnp.broadcast_to((drawn >> 1).astype(jnp.int32), shape)
        is_entry = within < sizes[ranking_ids.ids].reshape(to_row)
        scores.append(jnp.where(is_entry, score, -1) if packing.is_packed else score)
    return scores


def bits(first: Any, second: Any, index: Any) -> Any:
    """Draws the bits of some entries alone, from the two words of a key: uint32.

    `jax.random.bits` cannot do it, and without `jax_threefry_partitionable` it draws other bits.
    """
    left, right = _threefry(first, second, index)
    return left ^ right


def _word(number: jax.Array | int) -> Any:
    """Returns uint32 [1]."""
    if isinstance(number, jax.Array):
        return number.astype(jnp.uint32).reshape(1)
    return np.full(1, number, np.uint32)


def _threefry(first_key: Any, second_key: Any, low: Any) -> Keys:
    """Encrypts the words 0 and `low` by Threefry-2x32 with 20 rounds (Salmon et al., 2011).

    JAX's own primitive is a loop on CPU. XLA fuses these lines instead into one kernel, which
    compiles six times as fast and runs ten times as fast.

    Args:
      first_key: First words of the keys, uint32 arrays of NumPy or JAX.
      second_key: Second words.
      low: Second words of what is encrypted; they broadcast with the keys.

    Returns:
      Two uint32 arrays.
    """
    if all(isinstance(word, np.ndarray) for word in (first_key, second_key, low)):
        return _rounds(first_key, second_key, low)
    return _traced_rounds(first_key, second_key, low)


def _rounds(first_key: Any, second_key: Any, low: Any) -> Keys:
    schedule = (first_key, second_key, first_key ^ second_key ^ np.uint32(0x1BD11BDA))
    first, second = first_key, low + second_key
    for group in range(5):
        for distance in ((13, 15, 26, 6), (17, 29, 16, 24))[group % 2]:
            first = first + second
            rotated = (second << np.uint32(distance)) | (second >> np.uint32(32 - distance))
            second = rotated ^ first
        first = first + schedule[(group + 1) % 3]
        second = second + schedule[(group + 2) % 3] + np.uint32(group + 1)
    return first, second


# Traced once for each shape, and outside of jit one program instead of a hundred operations.
_traced_rounds = jax.jit(_rounds)
