"""Drop and grow: which weights of the sparse leaves are active next."""

from collections.abc import Callable, Sequence

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
    excluded = jnp.int32(_selection.EXCLUDED)
    if prefer is not None:
        kept = _selection.top_k(keep_scores, rows, keep)
        pairs = zip(kept, prefer(kept), strict=True)
        rest = [jnp.where(k, excluded, scores) for k, scores in pairs]
        grown = _selection.top_k(rest, rows, grow)
        return [k | g for k, g in zip(kept, grown, strict=True)]

    # Keeping and growing are the same search on different scores: a loop of two rounds
    # compiles it once.
    def choose(round: jax.Array, carry: tuple[list, list]) -> tuple[list, list]:
        scores, chosen = carry
        number = jax.tree.map(lambda a, b: jnp.where(round == 0, a, b), keep, grow)
        top = _selection.top_k(scores, rows, number)
        chosen = [a | b for a, b in zip(chosen, top, strict=True)]
        pairs = zip(chosen, grow_scores, strict=True)
        return [jnp.where(c, excluded, g) for c, g in pairs], chosen

    nothing = [jnp.zeros_like(score, bool) for score in keep_scores]
    _, chosen = lax.fori_loop(0, 2, choose, (list(keep_scores), nothing))
    return chosen
