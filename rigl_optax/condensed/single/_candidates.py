"""Finds the best places of a layer, a few of its inputs at a time.

Scores of all places would take as much memory as a dense kernel, which training never has.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from rigl_optax._ranking import _packing, _random, _top_k
from rigl_optax._ranking._packing import RankingIds
from rigl_optax._types import Seed
from rigl_optax.condensed import _compaction, _devices

if TYPE_CHECKING:  # which draws candidates, and so imports this module
    from rigl_optax.condensed.single._csr_topology import CSRTopology

# Places that are scored at once, unless more are wanted: 1 MB of scores, ranked in the cache.
_AT_ONCE = 1 << 18

# `scorer(size)` returns a function `scores(first)` of `size` inputs from a first one on: int32
# [size, outputs], 0 or above; arbitrary beyond the last input of the layer.
Scorer = Callable[[int], Callable[[jax.Array], jax.Array]]


class Candidates(NamedTuple):
    """The best places of a layer for new weights, in their row-major order.

    Attributes:
      scores: int32 [k].
      places: int32 [k]: row-major indices, ascending.
    """

    scores: jax.Array
    places: jax.Array


def best(
    shape: tuple[int, ...],
    number: int,
    scorer: Scorer,
    taken: "CSRTopology | None" = None,
    *like: jax.Array,
) -> Candidates:
    """Finds the places of largest score; ties go to the lower row-major index.

    In a loop over the inputs, the best places so far are ranked together with those of the next
    few inputs. A place that is dropped has `number` better ones, so it never comes back. A pass
    takes so many inputs that they have about `number` places, or `_AT_ONCE`: all passes together
    look at each score a few times whatever the density, and memory is a few times `number`.

    Args:
      shape: Shape of the layer, (in, out).
      number: How many places to find, static; at most as many as are not taken.
      scorer: Scores the places of a few inputs.
      taken: Stored weights, whose places are no candidates.
      *like: In a `shard_map`, the result differs over devices as these arrays do.

    Returns:
      Candidates, [number].
    """
    inputs, outputs = shape
    if not number:
        return Candidates(jnp.zeros(0, jnp.int32), jnp.zeros(0, jnp.int32))
    size = max(1, min(inputs, max(_AT_ONCE, number) // max(1, outputs)))
    scores_from, without_taken = scorer(size), _without(taken, size)

    def add(found: Candidates, first: jax.Array) -> tuple[Candidates, None]:
        is_there = (first + jnp.arange(size, dtype=jnp.int32) < inputs)[:, None]
        own = jnp.where(is_there, scores_from(first), _top_k.EXCLUDED)
        own = without_taken(own, first).reshape(-1)
        together = jnp.concatenate([found.scores, own])
        at, is_chosen = _first_of_best(together, number)
        earlier = found.places[jnp.minimum(at, number - 1)]
        places = jnp.where(at < number, earlier, first * outputs + at - number)
        scores = jnp.where(is_chosen, together[at], _top_k.EXCLUDED)
        return Candidates(scores, places), None

    firsts = jnp.arange(-(-inputs // size), dtype=jnp.int32) * size
    nothing = jnp.full(number, _top_k.EXCLUDED, jnp.int32), jnp.zeros(number, jnp.int32)
    start = Candidates(*(_devices.differing(x, *like) for x in nothing))
    return lax.scan(add, start, firsts)[0]


def at_random(
    seed: Seed,
    purpose: _random.Purpose,
    position: int,
    count: jax.Array | int,
    shape: tuple[int, ...],
    number: int,
    taken: "CSRTopology | None" = None,
) -> Candidates:
    """Finds the places of largest random score, as the masked form draws it for the whole layer."""

    def scorer(size: int) -> Callable[[jax.Array], jax.Array]:
        within = jnp.arange(size * shape[1], dtype=jnp.int32)
        packing = _packing.packing([within.shape], [False])

        def scores_from(first: jax.Array) -> jax.Array:
            places = [first * shape[1] + within]
            (drawn,) = _random.random_scores(seed, purpose, [position], packing, count, places)
            return drawn.reshape(size, shape[1])

        return scores_from

    return best(shape, number, scorer, taken)


def _first_of_best(scores: jax.Array, number: int) -> tuple[jax.Array, jax.Array]:
    """Returns indices of the `number` largest scores, ascending, and whether each exists."""
    (length,), row = scores.shape, int(np.prod(_packing.ROW))
    padded = jnp.pad(scores, (0, -length % row), constant_values=_top_k.EXCLUDED)
    padded = padded.reshape(-1, *_packing.ROW)
    k = jnp.minimum(number, _top_k.count_true(padded >= 0))
    one = RankingIds(np.zeros((), np.int32), np.zeros((), np.int32))
    (chosen,) = _top_k.top_k([padded], [one], k[None])
    at = _compaction.indices(chosen.reshape(-1)[:length], number)
    return at, jnp.arange(number, dtype=jnp.int32) < k


def _without(taken: "CSRTopology | None", size: int) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """Returns `without(scores, first)`, which excludes the places of stored weights."""
    if taken is None:
        return lambda scores, first: scores
    t, inputs = taken, taken.shape[0]
    # A piece may reach beyond these inputs, or the list: such rows are out of range, and dropped.
    rows = jnp.pad(t.rows[t.order], (0, t.piece), constant_values=inputs + size)
    cols = jnp.pad(t.ordered_cols, (0, t.piece))

    def without(scores: jax.Array, first: jax.Array) -> jax.Array:
        def exclude(scores: jax.Array, at: jax.Array) -> jax.Array:
            own_rows, own_cols = (lax.dynamic_slice_in_dim(a, at, t.piece) for a in (rows, cols))
            return scores.at[own_rows - first, own_cols].set(_top_k.EXCLUDED, mode="drop")

        stop = t.row_starts[jnp.minimum(first + size, inputs)]
        return t.by_pieces(t.row_starts[first], stop, exclude, scores)

    return without
