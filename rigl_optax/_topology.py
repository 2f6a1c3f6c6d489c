"""Drop and grow: which weights of the sparse leaves are active next."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from rigl_optax import _selection
from rigl_optax._packing import Rows
from rigl_optax._selection import PerRanking

Arrays = list[jax.Array]


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
    excluded = jnp.int32(_selection.EXCLUDED)
    return [
        jnp.where(mask, _selection.magnitude_scores(weight), excluded)
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
    nothing = jnp.zeros((), jnp.int32)
    numbers = (lambda kept: nothing), (lambda found: grow)
    return _chosen(keep_scores, grow_scores, rows, keep, *numbers, prefer)[0]


def keep_and_grow_by_signal(
    masks: Sequence[jax.Array],
    keep_scores: Sequence[jax.Array],
    grow_scores: Sequence[jax.Array],
    rows: Sequence[Rows],
    keep: PerRanking,
    grow: PerRanking | Callable[[jax.Array], PerRanking],
    *,
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
      layers: For each array, the layer each of its rows belongs to; `rows`, where layers have no
        parts.
      prefer: As in `keep_and_grow`.

    Returns:
      The masks, and the number of layers that stayed although they were to change.
    """

    def signal(kept: Arrays) -> jax.Array:
        return signals(masks, kept, grow_scores, layers)

    def number(found: jax.Array) -> PerRanking:
        return grow(found[0] > 0) if callable(grow) else grow

    chosen, found = _chosen(keep_scores, grow_scores, rows, keep, signal, number, prefer)
    return unless_uninformed(chosen, masks, found, layers)


def signals(
    masks: Sequence[jax.Array],
    kept: Sequence[jax.Array],
    grow_scores: Sequence[jax.Array],
    layers: Sequence[Rows],
) -> jax.Array:
    """Counts in each layer of scores above 0 that may grow, and of what is dropped; [2, layers]."""
    told = [~k & (s > 0) for k, s in zip(kept, grow_scores, strict=True)]
    dropped = [~k & m for k, m in zip(kept, masks, strict=True)]
    return jnp.stack([_selection.counts(told, layers), _selection.counts(dropped, layers)])


def unless_uninformed(
    chosen: Sequence[jax.Array],
    masks: Sequence[jax.Array],
    found: jax.Array,
    layers: Sequence[Rows],
) -> Grown:
    """`chosen`, but `masks` of layers without a signal, as `signals` has found them."""
    has_signal = found[0] > 0
    result = []
    for new, old, rows in zip(chosen, masks, layers, strict=True):
        takes_part = _selection.spread(has_signal, new, rows)
        result.append((new & takes_part) | (old & ~takes_part))
    return Grown(result, jnp.sum(~has_signal & (found[1] > 0), dtype=jnp.int32))


def _chosen(
    keep_scores: Sequence[jax.Array],
    grow_scores: Sequence[jax.Array],
    rows: Sequence[Rows],
    keep: PerRanking,
    look: Callable[[Arrays], jax.Array],
    grow: Callable[[jax.Array], PerRanking],
    prefer: Callable[[Arrays], Arrays] | None,
) -> tuple[Arrays, jax.Array]:
    """What is kept or grows, and what `look` has found of the masks of what is kept."""
    excluded = jnp.int32(_selection.EXCLUDED)
    if prefer is not None:
        kept = _selection.top_k(keep_scores, rows, keep)
        found = look(kept)
        pairs = zip(kept, prefer(kept), strict=True)
        rest = [jnp.where(k, excluded, scores) for k, scores in pairs]
        grown = _selection.top_k(rest, rows, grow(found))
        return [k | g for k, g in zip(kept, grown, strict=True)], found

    # Keeping and growing are the same search on different scores: a loop of two rounds
    # compiles it once.
    def choose(round: jax.Array, carry: tuple[list, list, jax.Array]) -> Any:
        scores, chosen, found = carry
        number = jax.tree.map(lambda a, b: jnp.where(round == 0, a, b), keep, grow(found))
        top = _selection.top_k(scores, rows, number)
        chosen = [a | b for a, b in zip(chosen, top, strict=True)]
        found = jnp.where(round == 0, look(chosen), found)
        pairs = zip(chosen, grow_scores, strict=True)
        return [jnp.where(c, excluded, g) for c, g in pairs], chosen, found

    nothing = [jnp.zeros_like(score, bool) for score in keep_scores]
    unseen = jnp.ones_like(look(nothing))  # of its shape, and type in a shard_map
    start = list(keep_scores), nothing, unseen
    _, chosen, found = lax.fori_loop(jnp.int32(0), jnp.int32(2), choose, start)
    return chosen, found
