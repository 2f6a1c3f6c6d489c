"""Drop and grow: which weights of the sparse leaves are active next."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from rigl_optax._ranking import _top_k
from rigl_optax._ranking._packing import Rows
from rigl_optax._ranking._top_k import PerRanking
from rigl_optax._types import Arrays


def drop_counts(active: jax.Array, fraction: jax.typing.ArrayLike) -> jax.Array:
    """How many of the active weights to drop: `int32(float32(n) * fraction)`, as the reference.

    Args:
      active: int32 array: numbers of active weights.
      fraction: Scalar, or one for each; clipped to [0, 1], NaN is 0.

    Returns:
      int32 array.
    """
    fraction = jnp.asarray(fraction).astype(jnp.float32)
    fraction = jnp.where(fraction > 0, jnp.minimum(fraction, 1), 0)
    # In float32, n may round up: never drop more than there are.
    return jnp.minimum(active, (active.astype(jnp.float32) * fraction).astype(jnp.int32))


def drop_scores(weights: Sequence[jax.Array], masks: Sequence[jax.Array]) -> Arrays:
    """Magnitudes of the active weights as scores; inactive ones are excluded."""
    excluded = jnp.int32(_top_k.EXCLUDED)
    return [
        jnp.where(mask, _top_k.magnitude_scores(weight), excluded)
        for weight, mask in zip(weights, masks, strict=True)
    ]


class Grown(NamedTuple):
    """Masks after a drop and a growth by scores that may say nothing."""

    masks: Arrays
    uninformed: jax.Array  # int32: layers that would have changed, had their scores said where


def keep_and_grow(
    keep_scores: Sequence[jax.Array],
    grow_scores: Sequence[jax.Array],
    rows: Sequence[Rows],
    keep: PerRanking,
    grow: PerRanking,
    prefer: Callable[[Arrays], Arrays] | None = None,
) -> Arrays:
    """The `keep` entries of largest keep score, and the `grow` of largest grow score of the rest.

    A weight dropped a moment ago may come back (paper, algorithm 1; reference code
    `sparse_optimizers_base.py`, lines 283-340).

    Args:
      keep_scores: int32 arrays, -1 for entries that cannot be kept.
      grow_scores: int32 arrays of the same shapes, -1 for no position.
      rows: Which rankings the rows of the arrays belong to.
      keep: int32 [rankings], or a number for each row, as `top_k` takes it.
      grow: As many numbers.
      prefer: From the masks of what is kept to the grow scores that hold then, instead of
        `grow_scores`.

    Returns:
      Bool arrays with `keep + grow` True entries in each ranking.
    """
    kept, grown = _kept_and_grown(keep_scores, grow_scores, rows, keep, lambda kept: grow, prefer)
    return [k | g for k, g in zip(kept, grown, strict=True)]


def keep_and_grow_by_signal(
    masks: Sequence[jax.Array],
    keep_scores: Sequence[jax.Array],
    grow_scores: Sequence[jax.Array],
    rows: Sequence[Rows],
    keep: PerRanking,
    grow: PerRanking | Callable[[jax.Array], PerRanking],
    *,
    dropped: jax.Array,
    layers: Sequence[Rows],
    prefer: Callable[[Arrays], Arrays] | None = None,
) -> Grown:
    """As `keep_and_grow`, but a layer stays as it is whose scores do not say where to grow.

    They say nothing if all outside the kept entries are 0, as of gradients that something has
    zeroed: the index alone would decide.

    Args:
      masks: What is active now.
      keep_scores: As in `keep_and_grow`, and so the others.
      grow_scores: As in `keep_and_grow`.
      rows: As in `keep_and_grow`.
      keep: As in `keep_and_grow`.
      grow: As in `keep_and_grow`; or a function of which layers have a signal.
      dropped: How many each layer drops, int32 [layers].
      layers: For each array, the layer each of its rows belongs to; `rows`, where layers have no
        parts.
      prefer: As in `keep_and_grow`.

    Returns:
      The masks, and the number of layers that stayed although they were to change.
    """

    def number(kept: Arrays) -> PerRanking:
        if not callable(grow):
            return grow
        return grow(signals(kept, grow_scores, layers))

    kept, grown = _kept_and_grown(keep_scores, grow_scores, rows, keep, number, prefer)
    has_signal = signals(kept, grow_scores, layers)
    chosen = [k | g for k, g in zip(kept, grown, strict=True)]
    return unless_uninformed(chosen, masks, has_signal, dropped, layers)


def signals(
    kept: Sequence[jax.Array], grow_scores: Sequence[jax.Array], layers: Sequence[Rows]
) -> jax.Array:
    """Whether a score outside what is kept is above 0, bool [layers]."""
    pairs = zip(kept, grow_scores, strict=True)
    return _top_k.counts([~k & (s > 0) for k, s in pairs], layers) > 0


def unless_uninformed(
    chosen: Sequence[jax.Array],
    masks: Sequence[jax.Array],
    has_signal: jax.Array,
    dropped: jax.Array,
    layers: Sequence[Rows],
) -> Grown:
    """`chosen`, but `masks` of layers without a signal; counted are those that were to drop."""
    result = []
    for new, old, rows in zip(chosen, masks, layers, strict=True):
        takes_part = _top_k.spread(has_signal, new, rows)
        result.append((new & takes_part) | (old & ~takes_part))
    return Grown(result, jnp.sum(~has_signal & (dropped > 0), dtype=jnp.int32))


def _kept_and_grown(
    keep_scores: Sequence[jax.Array],
    grow_scores: Sequence[jax.Array],
    rows: Sequence[Rows],
    keep: PerRanking,
    grow: Callable[[Arrays], PerRanking],
    prefer: Callable[[Arrays], Arrays] | None,
) -> tuple[Arrays, Arrays]:
    """Masks of what is kept and of what grows, as many as `grow` says of the former."""
    excluded = jnp.int32(_top_k.EXCLUDED)
    if prefer is not None:
        kept = _top_k.top_k(keep_scores, rows, keep)
        pairs = zip(kept, prefer(kept), strict=True)
        rest = [jnp.where(k, excluded, scores) for k, scores in pairs]
        return kept, _top_k.top_k(rest, rows, grow(kept))

    # Keeping and growing are the same search on different scores: a loop of two rounds
    # compiles it once. An entry has the number of its round, or 0.
    def choose(round: jax.Array, carry: tuple[list, list]) -> tuple[list, list]:
        scores, chosen = carry
        growing = grow([c > 0 for c in chosen])
        number = jax.tree.map(lambda a, b: jnp.where(round == 1, a, b), keep, growing)
        top = _top_k.top_k(scores, rows, number)
        now = round.astype(jnp.int8)
        chosen = [jnp.where(t, now, c) for c, t in zip(chosen, top, strict=True)]
        pairs = zip(chosen, grow_scores, strict=True)
        return [jnp.where(c > 0, excluded, g) for c, g in pairs], chosen

    nothing = [jnp.zeros_like(score, jnp.int8) for score in keep_scores]
    start = list(keep_scores), nothing
    _, chosen = lax.fori_loop(jnp.int32(1), jnp.int32(3), choose, start)
    return [c == 1 for c in chosen], [c == 2 for c in chosen]
