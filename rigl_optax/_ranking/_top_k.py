"""Exact top-k masks by threshold search: only comparisons and counts, no sort.

Scores are int32. Non-negative float32 scores viewed as int32 keep their order, so
that the k-th largest is found bit by bit, from the highest, with one count a bit.
Reductions alone are needed: nothing of the size of a weight moves between devices,
k may be traced, and the result is the same integers everywhere.
"""

import functools
from collections.abc import Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from rigl_optax._ranking import _packing
from rigl_optax._ranking._packing import Packing, Rows
from rigl_optax._xla import _sharding

# A number for each ranking, int32 [rankings]; or arrays with one for each row.
PerRanking: TypeAlias = jax.Array | list[jax.Array]

# Below every score: never among the k largest while k scores are 0 or above.
EXCLUDED = -1

_HIGHEST_BIT = 30


def magnitude_scores(x: jax.Array) -> jax.Array:
    """`abs(x)` as order-preserving int32 scores in [0, 2**31), compared as float32."""
    bits = lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32)
    return bits & jnp.int32(0x7FFFFFFF)


def count_true(mask: jax.Array, leading: int = 0) -> jax.Array:
    """Exact number of True entries, int32, over all but the `leading` axes."""
    if mask.ndim == leading:
        return mask.astype(jnp.int32)
    # One axis first, then the rest. XLA's CPU backend spreads over cores only a reduction
    # with many outputs, and in one pass only over up to 32 entries; small integers take
    # less work. The barrier keeps it from merging the two sums into one.
    axis = mask.ndim - 1
    if axis > leading and mask.shape[axis - 1] <= 32:
        axis -= 1
    length = mask.shape[axis]
    dtype = jnp.int8 if length < 2**7 else jnp.int16 if length < 2**15 else jnp.int32
    partial = lax.optimization_barrier(jnp.sum(mask, axis=axis, dtype=dtype))
    axes = tuple(range(leading, partial.ndim))
    return jnp.sum(partial.astype(jnp.int32), axis=axes, dtype=jnp.int32)


def counts(masks: Sequence[jax.Array], rows: Sequence[Rows]) -> jax.Array:
    """Number of True entries in each ranking, int32 [rankings]."""
    each = [count_true(m, r.ids.ndim) for m, r in zip(masks, rows, strict=True)]
    per_row = [_sharding.whole(x).reshape(-1) for x in each]
    ids = np.concatenate([r.ids.reshape(-1) for r in rows])
    vector = jnp.concatenate(per_row)
    rankings = int(ids[-1]) + 1
    if rankings == len(ids):
        return vector
    return jax.ops.segment_sum(vector, jnp.asarray(ids), rankings, indices_are_sorted=True)


def counts_by_row(masks: Sequence[jax.Array], rows: Sequence[Rows]) -> list[jax.Array]:
    """Number of True entries in each row, int32; in parts where the masks are."""
    return [count_true(m, r.ids.ndim) for m, r in zip(masks, rows, strict=True)]


def counts_for(packing: Packing, masks: Sequence[jax.Array]) -> PerRanking:
    """Number of True entries in each ranking of a packing, in the form that `top_k` takes."""
    return (counts_by_row if packing.in_parts else counts)(masks, packing.rows)


def top_k(scores: Sequence[jax.Array], rows: Sequence[Rows], k: PerRanking) -> list[jax.Array]:
    """Masks of the k largest scores of each ranking; ties go to the lower flat index.

    All rankings share one loop: a loop for each takes seconds to compile on a model with
    many layers.

    Args:
      scores: int32 arrays, entries -1 or above.
      rows: For each array, the rankings its rows belong to.
      k: int32 [rankings]; or, where each row is a ranking of its own, int32 arrays of a number
        for each row, which may lie where the rows do. At least k scores of each ranking must be 0
        or above.

    Returns:
      Bool arrays of the shapes of `scores`, with exactly k True entries a ranking.
    """
    if isinstance(k, list):
        found = counts_by_row([s >= 0 for s in scores], rows)
        k = [_sharding.like(x, f) for x, f in zip(k, found, strict=True)]

    def count(masks: list[jax.Array]) -> PerRanking:
        return (counts_by_row if isinstance(k, list) else counts)(masks, rows)

    def spread_all(vector: PerRanking) -> list[jax.Array]:
        if isinstance(vector, list):
            each = zip(vector, scores, rows, strict=True)
            return [lax.expand_dims(v, range(r.ids.ndim, s.ndim)) for v, s, r in each]
        return [spread(vector, s, r) for s, r in zip(scores, rows, strict=True)]

    def differ(found: PerRanking, wanted: PerRanking) -> jax.Array:
        pairs = zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True)
        return functools.reduce(jnp.logical_or, [jnp.any(f != w) for f, w in pairs])

    # The largest threshold with at least k scores at or above it, highest bit first. One
    # with exactly k is as good, and ends the search early. `above` counts the scores at
    # the lowest candidate that had too few: in the end, those above the threshold.
    def threshold_pass(carry: Any) -> Any:
        bit, threshold, at_least, above = carry
        candidate = jax.tree.map(lambda t: t | (jnp.int32(1) << bit), threshold)
        found = count([s >= c for s, c in zip(scores, spread_all(candidate), strict=True)])
        enough = jax.tree.map(jnp.greater_equal, found, k)
        threshold = jax.tree.map(jnp.where, enough, candidate, threshold)
        at_least = jax.tree.map(jnp.where, enough, found, at_least)
        return bit - 1, threshold, at_least, jax.tree.map(jnp.where, enough, above, found)

    def threshold_open(carry: Any) -> jax.Array:
        bit, _, at_least, _ = carry
        return (bit >= 0) & differ(at_least, k)

    most = jnp.iinfo(jnp.int32).max
    zeros = jax.tree.map(jnp.zeros_like, k)
    uncounted = jax.tree.map(lambda x: jnp.full_like(x, most), k)
    _, threshold, at_least, above = lax.while_loop(
        threshold_open, threshold_pass, (jnp.int32(_HIGHEST_BIT), zeros, uncounted, zeros)
    )
    thresholds = spread_all(threshold)

    # Of the scores equal to the threshold, the first few by index: the largest bound on
    # the index below which there are at most as many as are still wanted; again, one
    # with exactly as many is as good.
    wanted = jax.tree.map(lambda n, x, a: jnp.where(n == x, 0, x - a), at_least, k, above)

    def index_pass(carry: Any) -> Any:
        bit, bound, taken = carry
        candidate = jax.tree.map(lambda b: b | (jnp.int32(1) << bit), bound)
        below = zip(scores, thresholds, rows, spread_all(candidate), strict=True)
        found = count([(s == t) & _is_below(c, s, r) for s, t, r, c in below])
        fits = jax.tree.map(jnp.less_equal, found, wanted)
        bound = jax.tree.map(jnp.where, fits, candidate, bound)
        return bit - 1, bound, jax.tree.map(jnp.where, fits, found, taken)

    def index_open(carry: Any) -> jax.Array:
        bit, _, taken = carry
        return (bit >= 0) & differ(taken, wanted)

    largest = max(
        int(np.max(r.starts)) + int(np.prod(s.shape[r.ids.ndim :], dtype=np.int64))
        for s, r in zip(scores, rows, strict=True)
    )
    highest = min(largest.bit_length() - 1, _HIGHEST_BIT)
    _, bound, _ = lax.while_loop(index_open, index_pass, (jnp.int32(highest), zeros, zeros))
    # Without a tie all that equal the threshold are taken.
    bounds = spread_all(
        jax.tree.map(lambda n, x, b: jnp.where(n == x, most, b), at_least, k, bound)
    )
    chosen = zip(scores, thresholds, rows, bounds, strict=True)
    return [(s > t) | ((s == t) & _is_below(b, s, r)) for s, t, r, b in chosen]


def spread(vector: jax.Array, array: jax.Array, rows: Rows) -> jax.Array:
    """For each row of an array its ranking's entry of a vector, ready to broadcast."""
    return _take(vector, rows.ids).reshape(_rows_shape(rows.ids, array))


def _take(vector: jax.Array, ids: np.ndarray) -> jax.Array:
    """`vector[ids]` for static ids, kept out of the kernels that use it for each entry."""
    if ids.ndim == 0:
        return lax.index_in_dim(vector, int(ids), keepdims=False)
    ids = ids.reshape(-1)
    if np.array_equal(ids, np.arange(ids[0], ids[0] + len(ids))):
        return lax.slice_in_dim(vector, int(ids[0]), int(ids[0]) + len(ids))
    return lax.optimization_barrier(vector[ids])


def _rows_shape(ids: np.ndarray, scores: jax.Array) -> tuple[int, ...]:
    return ids.shape + (1,) * (scores.ndim - ids.ndim)


def _is_below(bound: jax.Array, x: jax.Array, rows: Rows) -> jax.Array:
    """Whether the row-major index of each entry within its ranking is below `bound`."""
    if rows.starts.any():
        bound = bound - jnp.asarray(rows.starts).reshape(_rows_shape(rows.ids, x))
    return _packing.iota(x.shape, rows.ids.ndim) < bound
