"""Finds exact top-k masks by threshold search: only comparisons and counts, no sort.

Scores are int32. Non-negative float32 numbers keep their order when their bits are read as int32,
so the k-th largest score is found bit by bit, from the highest, with one count for each bit. Only
reductions are needed: nothing of the size of a weight moves between devices
(`tests/core/test_no_gather.py`), k may be traced, and every device finds the same integers.
"""

import functools
from collections.abc import Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from rigl_optax._ranking import _packing
from rigl_optax._ranking._packing import Packing, RankingIds
from rigl_optax._xla import _sharding

# Numbers, one for each ranking: int32 [rankings]; or, where each row is a ranking, a list of int32
# arrays with one number for each row.
PerRanking: TypeAlias = jax.Array | list[jax.Array]

# Below every score: such an entry is never chosen while k scores are 0 or above.
EXCLUDED = -1

_HIGHEST_BIT = 30  # of a non-negative int32


def magnitude_scores(x: jax.Array) -> jax.Array:
    """Returns int32 scores in [0, 2**31) in the order of `abs(x)`, compared as float32."""
    bits = lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32)
    return bits & jnp.int32(0x7FFFFFFF)


def count_true(mask: jax.Array, leading: int = 0) -> jax.Array:
    """Counts the True entries, int32, over all but the first `leading` axes."""
    if mask.ndim == leading:
        return mask.astype(jnp.int32)
    # First along one axis, then along the rest: XLA's CPU backend uses several cores only for a
    # reduction with many outputs, and reduces up to 32 entries in one pass.
    axis = mask.ndim - 1
    if axis > leading and mask.shape[axis - 1] <= 32:
        axis -= 1
    length = mask.shape[axis]
    # Small integers are less work; the barrier keeps XLA from merging the two sums into one.
    dtype = jnp.int8 if length < 2**7 else jnp.int16 if length < 2**15 else jnp.int32
    partial = lax.optimization_barrier(jnp.sum(mask, axis=axis, dtype=dtype))
    axes = tuple(range(leading, partial.ndim))
    return jnp.sum(partial.astype(jnp.int32), axis=axes, dtype=jnp.int32)


def counts(masks: Sequence[jax.Array], ranking_ids: Sequence[RankingIds]) -> jax.Array:
    """Counts the True entries in each ranking, int32 [rankings]."""
    counted = [count_true(m, r.ids.ndim) for m, r in zip(masks, ranking_ids, strict=True)]
    per_row = [_sharding.whole(x).reshape(-1) for x in counted]
    ids = np.concatenate([r.ids.reshape(-1) for r in ranking_ids])
    vector = jnp.concatenate(per_row)
    rankings = int(ids[-1]) + 1  # ids ascend from 0
    if rankings == len(ids):
        return vector
    return jax.ops.segment_sum(vector, jnp.asarray(ids), rankings, indices_are_sorted=True)


def counts_by_row(masks: Sequence[jax.Array], ranking_ids: Sequence[RankingIds]) -> list[jax.Array]:
    """Counts the True entries in each row, int32; sharded as the rows of the masks are."""
    return [count_true(m, r.ids.ndim) for m, r in zip(masks, ranking_ids, strict=True)]


def counts_for(packing: Packing, masks: Sequence[jax.Array]) -> PerRanking:
    """Counts the True entries in each ranking of a packing, in the form that `top_k` takes."""
    return (counts_by_row if packing.in_parts else counts)(masks, packing.ranking_ids)


def top_k(
    scores: Sequence[jax.Array], ranking_ids: Sequence[RankingIds], k: PerRanking
) -> list[jax.Array]:
    """Returns masks of the k largest scores of each ranking; ties go to the lower flat index.

    All rankings share one loop. A loop for each of them takes XLA far longer to compile on a model
    with many layers.

    Args:
      scores: int32 arrays, entries -1 or above.
      ranking_ids: The rankings that the rows of each array belong to.
      k: int32 [rankings]; or, where each row is a ranking, a list of int32 arrays with one number
        for each row, which may be sharded as the rows are. At least k scores of each ranking must
        be 0 or above.

    Returns:
      Bool arrays of the shapes of `scores`, with exactly k True entries in each ranking.
    """
    if isinstance(k, list):
        number = counts_by_row([s >= 0 for s in scores], ranking_ids)
        k = [_sharding.like(x, f) for x, f in zip(k, number, strict=True)]

    def count(masks: list[jax.Array]) -> PerRanking:
        return (counts_by_row if isinstance(k, list) else counts)(masks, ranking_ids)

    def spread_all(vector: PerRanking) -> list[jax.Array]:
        if isinstance(vector, list):
            triples = zip(vector, scores, ranking_ids, strict=True)
            return [lax.expand_dims(v, range(r.ids.ndim, s.ndim)) for v, s, r in triples]
        return [spread(vector, s, r) for s, r in zip(scores, ranking_ids, strict=True)]

    def differ(number: PerRanking, wanted: PerRanking) -> jax.Array:
        pairs = zip(jax.tree.leaves(number), jax.tree.leaves(wanted), strict=True)
        return functools.reduce(jnp.logical_or, [jnp.any(f != w) for f, w in pairs])

    # Finds the largest threshold with at least k scores at or above it, highest bit first. A
    # threshold with exactly k is as good and ends the search early. `above` is the count at the
    # lowest candidate that had too few: in the end, the number of scores above the threshold.
    def threshold_pass(carry: Any) -> Any:
        bit, threshold, at_least, above = carry
        candidate = jax.tree.map(lambda t: t | (jnp.int32(1) << bit), threshold)
        number = count([s >= c for s, c in zip(scores, spread_all(candidate), strict=True)])
        enough = jax.tree.map(jnp.greater_equal, number, k)
        threshold = jax.tree.map(jnp.where, enough, candidate, threshold)
        at_least = jax.tree.map(jnp.where, enough, number, at_least)
        return bit - 1, threshold, at_least, jax.tree.map(jnp.where, enough, above, number)

    def threshold_open(carry: Any) -> jax.Array:
        bit, _, at_least, _ = carry
        return (bit >= 0) & differ(at_least, k)

    most = jnp.iinfo(jnp.int32).max
    # Before the first pass all k are at or above 0, and nobody has counted: `most` is no number of
    # entries that is asked for, so that the search begins.
    zeros = jax.tree.map(jnp.zeros_like, k)
    uncounted = jax.tree.map(lambda x: jnp.full_like(x, most), k)
    _, threshold, at_least, above = lax.while_loop(
        threshold_open, threshold_pass, (jnp.int32(_HIGHEST_BIT), zeros, uncounted, zeros)
    )
    thresholds = spread_all(threshold)

    # Of the scores equal to the threshold the first ones are taken, by index. This finds the
    # largest bound on the index below which there are at most as many as are still wanted; again,
    # a bound with exactly as many ends the search early.
    wanted = jax.tree.map(lambda n, x, a: jnp.where(n == x, 0, x - a), at_least, k, above)

    def index_pass(carry: Any) -> Any:
        bit, bound, taken = carry
        candidate = jax.tree.map(lambda b: b | (jnp.int32(1) << bit), bound)
        below = zip(scores, thresholds, ranking_ids, spread_all(candidate), strict=True)
        number = count([(s == t) & _is_below(c, s, r) for s, t, r, c in below])
        fits = jax.tree.map(jnp.less_equal, number, wanted)
        bound = jax.tree.map(jnp.where, fits, candidate, bound)
        return bit - 1, bound, jax.tree.map(jnp.where, fits, number, taken)

    def index_open(carry: Any) -> jax.Array:
        bit, _, taken = carry
        return (bit >= 0) & differ(taken, wanted)

    # An index needs no more bits than the largest ranking has entries.
    largest = max(
        int(np.max(r.starts)) + int(np.prod(s.shape[r.ids.ndim :], dtype=np.int64))
        for s, r in zip(scores, ranking_ids, strict=True)
    )
    highest = min(largest.bit_length() - 1, _HIGHEST_BIT)
    _, bound, _ = lax.while_loop(index_open, index_pass, (jnp.int32(highest), zeros, zeros))
    # Without a tie, all scores that equal the threshold are taken.
    bounds = spread_all(
        jax.tree.map(lambda n, x, b: jnp.where(n == x, most, b), at_least, k, bound)
    )
    chosen = zip(scores, thresholds, ranking_ids, bounds, strict=True)
    return [(s > t) | ((s == t) & _is_below(b, s, r)) for s, t, r, b in chosen]


def spread(vector: jax.Array, array: jax.Array, ranking_ids: RankingIds) -> jax.Array:
    """Returns, for each row of an array, its ranking's entry of a vector, ready to broadcast."""
    return _take(vector, ranking_ids.ids).reshape(_rows_shape(ranking_ids.ids, array))


def _take(vector: jax.Array, ids: np.ndarray) -> jax.Array:
    """Returns `vector[ids]` for static ids."""
    if ids.ndim == 0:
        return lax.index_in_dim(vector, int(ids), keepdims=False)
    ids = ids.reshape(-1)
    # Rankings of consecutive rows, as where nothing is packed: a slice, and no gather.
    if np.array_equal(ids, np.arange(ids[0], ids[0] + len(ids))):
        return lax.slice_in_dim(vector, int(ids[0]), int(ids[0]) + len(ids))
    # The barrier keeps XLA from fusing this gather into kernels that would repeat it per entry.
    return lax.optimization_barrier(vector[ids])


def _rows_shape(ids: np.ndarray, scores: jax.Array) -> tuple[int, ...]:
    return ids.shape + (1,) * (scores.ndim - ids.ndim)


def _is_below(bound: jax.Array, x: jax.Array, ranking_ids: RankingIds) -> jax.Array:
    """Returns whether the row-major index of each entry within its ranking is below `bound`."""
    if ranking_ids.starts.any():  # known while tracing: most rankings begin with their row
        bound = bound - jnp.asarray(ranking_ids.starts).reshape(_rows_shape(ranking_ids.ids, x))
    return _packing.iota(x.shape, ranking_ids.ids.ndim) < bound
