"""Drop and grow: which weights of the sparse leaves are active next."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from rigl_optax import _selection
from rigl_optax._packing import Rows


def drop_counts(active: jax.Array, fraction: jax.typing.ArrayLike) -> jax.Array:
    """How many of the active weights to drop: `int32(float32(n) * fraction)`, as the reference.

    Args:
      active: int32 array: numbers of active weights.
      fraction: Scalar; clipped to [0, 1], NaN is 0.

    Returns:
      int32 array.
    """
    fraction = jnp.asarray(fraction).astype(jnp.float32)
    fraction = jnp.where(fraction > 0, jnp.minimum(fraction, 1), 0)
    # In float32, n may round up: never drop more than there are.
    return jnp.minimum(active, (active.astype(jnp.float32) * fraction).astype(jnp.int32))


def drop_and_grow(
    weights: Sequence[jax.Array],
    masks: Sequence[jax.Array],
    grow_scores: Sequence[jax.Array],
    rows: Sequence[Rows],
    fraction: jax.typing.ArrayLike,
) -> list[jax.Array]:
    """Drops the smallest active weights and grows as many where the scores are largest.

    With n active weights in a layer and `k = int32(float32(n) * fraction)`, the n - k of
    largest magnitude are kept; of all that are not kept, the k of largest grow score
    become active. A weight dropped a moment ago may come back (paper, algorithm 1;
    reference code `sparse_optimizers_base.py`, lines 283-340).

    Args:
      weights: Floating-point arrays.
      masks: Bool arrays of the same shapes: active now.
      grow_scores: int32 arrays of the same shapes; non-negative, -1 for no position.
      rows: Which rankings the rows of the arrays belong to.
      fraction: Scalar; clipped to [0, 1].

    Returns:
      The new masks, with as many True entries in each layer as the old.
    """
    excluded = jnp.int32(_selection.EXCLUDED)
    active = _selection.counts(masks, rows)
    dropped = drop_counts(active, fraction)
    drop_scores = [
        jnp.where(mask, _selection.magnitude_scores(weight), excluded)
        for weight, mask in zip(weights, masks, strict=True)
    ]

    # Keeping and growing are the same search on different scores: a loop of two rounds
    # compiles it once.
    def choose(round: jax.Array, carry: tuple[list, list]) -> tuple[list, list]:
        scores, chosen = carry
        k = jnp.where(round == 0, active - dropped, dropped)
        top = _selection.top_k(scores, rows, k)
        chosen = [a | b for a, b in zip(chosen, top, strict=True)]
        pairs = zip(chosen, grow_scores, strict=True)
        return [jnp.where(c, excluded, g) for c, g in pairs], chosen

    nothing = [jnp.zeros_like(mask) for mask in masks]
    _, chosen = lax.fori_loop(0, 2, choose, (drop_scores, nothing))
    return chosen
