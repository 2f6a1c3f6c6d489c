"""Drops and grows: chooses which weights of the sparse leaves are active next."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from rigl_optax._ranking import _top_k
from rigl_optax._ranking._packing import RankingIds
from rigl_optax._ranking._top_k import PerRanking
from rigl_optax._types import Arrays


def drop_counts(active: jax.Array, fraction: jax.typing.ArrayLike) -> jax.Array:
    """Returns how many active weights to drop, `int32(float32(n) * fraction)` as the reference.

    Args:
      active: int32 array: numbers of active weights.
      fraction: A scalar, or an array of the shape of `active`; clipped to [0, 1], NaN counts as 0.

    Returns:
      int32 array of the shape of `active`.
    """
    fraction = jnp.asarray(fraction).astype(jnp.float32)
    fraction = jnp.where(fraction > 0, jnp.minimum(fraction, 1), 0)
    # float32(n) may round up; `minimum` keeps the number at or below n.
    return jnp.minimum(active, (active.astype(jnp.float32) * fraction).astype(jnp.int32))


def drop_scores(weights: Sequence[jax.Array], masks: Sequence[jax.Array]) -> Arrays:
    """Returns the magnitudes of the active weights as scores, and EXCLUDED for inactive ones."""
    excluded = jnp.int32(_top_k.EXCLUDED)
    return [
        jnp.where(mask, _top_k.magnitude_scores(weight), excluded)
        for weight, mask in zip(weights, masks, strict=True)
    ]


class Grown(NamedTuple):
    """New masks, and how many layers kept their old ones for want of a growth score above 0."""

    masks: Arrays
    uninformed: jax.Array  # int32 scalar: layers that were to drop weights but kept their mask


def keep_and_grow(
    keep_scores: Sequence[jax.Array],
    grow_scores: Sequence[jax.Array],
    ranking_ids: Sequence[RankingIds],
    keep: PerRanking,
    grow: PerRanking,
    prefer: Callable[[Arrays], Arrays] | None = None,
) -> Arrays:
    """Keeps the `keep` entries of largest keep score, and grows the `grow` best of the others.

    A dropped weight may grow again at once (paper, algorithm 1; reference code
    `sparse_optimizers_base.py`, lines 283-340).

    Args:
      keep_scores: int32 arrays; -1 for entries that cannot be kept.
      grow_scores: int32 arrays of the same shapes; -1 for padding.
      ranking_ids: The rankings that the rows of each array belong to.
      keep: int32 [rankings], or an array for each of `keep_scores`, as `top_k` takes it.
      grow: As `keep`.
      prefer: `prefer(kept) -> grow_scores`: growth scores that depend on the masks of the kept
        entries and replace `grow_scores`; None if they do not.

    Returns:
      Bool arrays with `keep + grow` True entries in each ranking.
    """
    kept, grown = _kept_and_grown(
        keep_scores, grow_scores, ranking_ids, keep, lambda kept: grow, prefer
    )
    return [k | g for k, g in zip(kept, grown, strict=True)]


def keep_and_grow_by_signal(
    masks: Sequence[jax.Array],
    keep_scores: Sequence[jax.Array],
    grow_scores: Sequence[jax.Array],
    ranking_ids: Sequence[RankingIds],
    keep: PerRanking,
    grow: PerRanking | Callable[[jax.Array], PerRanking],
    *,
    dropped: jax.Array,
    layers: Sequence[RankingIds],
    prefer: Callable[[Arrays], Arrays] | None = None,
) -> Grown:
    """Does what `keep_and_grow` does, but leaves a layer as it is if all its growth scores are 0.

    If every score outside the kept entries is 0 (a skipped step of loss scaling, `zero_nans`), the
    index alone would decide where to grow.

    Args:
      masks: Bool arrays: the entries that are active now.
      keep_scores: As in `keep_and_grow`.
      grow_scores: As in `keep_and_grow`.
      ranking_ids: As in `keep_and_grow`.
      keep: As in `keep_and_grow`.
      grow: As in `keep_and_grow`; or `grow(has_signal) -> numbers`, where `has_signal` is bool
        [layers].
      dropped: int32 [layers]: how many entries each layer drops.
      layers: The layers that the rows of each array belong to; `ranking_ids` itself where a layer
        is one ranking.
      prefer: As in `keep_and_grow`.

    Returns:
      The masks, and the number of layers that were to drop entries but kept their mask.
    """

    def number(kept: Arrays) -> PerRanking:
        if not callable(grow):
            return grow
        return grow(signals(kept, grow_scores, layers))

    kept, grown = _kept_and_grown(keep_scores, grow_scores, ranking_ids, keep, number, prefer)
    has_signal = signals(kept, grow_scores, layers)
    chosen = [k | g for k, g in zip(kept, grown, strict=True)]
    return unless_uninformed(chosen, masks, has_signal, dropped, layers)


def signals(
    kept: Sequence[jax.Array], grow_scores: Sequence[jax.Array], layers: Sequence[RankingIds]
) -> jax.Array:
    """Returns whether a growth score outside the kept entries is above 0, bool [layers]."""
    pairs = zip(kept, grow_scores, strict=True)
    return _top_k.counts([~k & (s > 0) for k, s in pairs], layers) > 0


def unless_uninformed(
    chosen: Sequence[jax.Array],
    masks: Sequence[jax.Array],
    has_signal: jax.Array,
    dropped: jax.Array,
    layers: Sequence[RankingIds],
) -> Grown:
    """Returns `chosen`, with the old `masks` in layers without a signal, and counts those layers.

    Only layers that were to drop something (`dropped > 0`) are counted.
    """
    result = []
    for new, old, ranking_ids in zip(chosen, masks, layers, strict=True):
        takes_part = _top_k.spread(has_signal, new, ranking_ids)
        result.append((new & takes_part) | (old & ~takes_part))
    return Grown(result, jnp.sum(~has_signal & (dropped > 0), dtype=jnp.int32))


def _kept_and_grown(
    keep_scores: Sequence[jax.Array],
    grow_scores: Sequence[jax.Array],
    ranking_ids: Sequence[RankingIds],
    keep: PerRanking,
    grow: Callable[[Arrays], PerRanking],
    prefer: Callable[[Arrays], Arrays] | None,
) -> tuple[Arrays, Arrays]:
    """Returns the masks of the kept and of the grown entries; `grow(kept)` says how many grow."""
    excluded = jnp.int32(_top_k.EXCLUDED)
    if prefer is not None:
        kept = _top_k.top_k(keep_scores, ranking_ids, keep)
        pairs = zip(kept, prefer(kept), strict=True)
        rest = [jnp.where(k, excluded, scores) for k, scores in pairs]
        return kept, _top_k.top_k(rest, ranking_ids, grow(kept))

    # Keeping and growing are the same search on different scores, so a loop of two rounds
    # compiles it once (`benchmarks/update_overhead.py` prints seconds of compilation). An entry of
    # `chosen` is 0, or the round that chose it: one int8 array instead of two masks.
    def choose(round: jax.Array, carry: tuple[list, list]) -> tuple[list, list]:
        scores, chosen = carry
        growing = grow([c > 0 for c in chosen])
        number = jax.tree.map(lambda a, b: jnp.where(round == 1, a, b), keep, growing)
        top = _top_k.top_k(scores, ranking_ids, number)
        now = round.astype(jnp.int8)
        chosen = [jnp.where(t, now, c) for c, t in zip(chosen, top, strict=True)]
        pairs = zip(chosen, grow_scores, strict=True)
        return [jnp.where(c > 0, excluded, g) for c, g in pairs], chosen

    nothing = [jnp.zeros_like(score, jnp.int8) for score in keep_scores]
    start = list(keep_scores), nothing
    _, chosen = lax.fori_loop(jnp.int32(1), jnp.int32(3), choose, start)
    return [c == 1 for c in chosen], [c == 2 for c in chosen]
