"""The best places of a layer, found some of its inputs at a time: no score of all is ever there."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from rigl_optax._ranking import _packing, _random, _top_k
from rigl_optax._ranking._packing import RankingIds
from rigl_optax._types import Seed
from rigl_optax.condensed import _compaction, _devices
from rigl_optax.condensed.single._csr_topology import CSRTopology

# Places that are scored at once, unless more are wanted: their scores are made and ranked in cache.
_AT_ONCE = 1 << 18

# From how many inputs are looked at at once to a function: from the first of them to the scores of
# their places, int32 [inputs, outputs], 0 or above; beyond the last input of the layer, anything.
Scores = Callable[[int], Callable[[jax.Array], jax.Array]]


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
    score: Scores,
    taken: CSRTopology | None = None,
    *like: jax.Array,
) -> Candidates:
    """The places of largest score; ties go to the lower row-major index.

    The best so far and the scores of some inputs are ranked together, again and again: what is
    dropped on the way has `number` places before it, and never comes back. As many inputs are
    taken at once as have about `number` places, or a fixed number: the work is that of a few passes
    over the scores whatever the density, and memory a few times `number`.

    Args:
      shape: Of the layer, (in, out).
      number: How many, static; at most as many as are not taken.
      score: Of the places of some inputs.
      taken: Which places are no candidates.
      *like: What the result differs over devices as.

    Returns:
      Candidates, [number].
    """
    inputs, outputs = shape
    if not number:
        return Candidates(jnp.zeros(0, jnp.int32), jnp.zeros(0, jnp.int32))
    size = max(1, min(inputs, max(_AT_ONCE, number) // max(1, outputs)))
    of_inputs, without_taken = score(size), _without(taken, size)

    def add(found: Candidates, first: jax.Array) -> tuple[Candidates, None]:
        is_there = (first + jnp.arange(size, dtype=jnp.int32) < inputs)[:, None]
        own = jnp.where(is_there, of_inputs(first), _top_k.EXCLUDED)
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
    taken: CSRTopology | None = None,
) -> Candidates:
    """As `best`, by the scores that the masked form draws for the whole layer."""

    def score(size: int) -> Callable[[jax.Array], jax.Array]:
        within = jnp.arange(size * shape[1], dtype=jnp.int32)
        packing = _packing.packing([within.shape], [False])

        def of_inputs(first: jax.Array) -> jax.Array:
            places = [first * shape[1] + within]
            (drawn,) = _random.random_scores(seed, purpose, [position], packing, count, places)
            return drawn.reshape(size, shape[1])

        return of_inputs

    return best(shape, number, score, taken)


def _first_of_best(scores: jax.Array, number: int) -> tuple[jax.Array, jax.Array]:
    """Indices of the `number` largest scores, ascending, and which of these there are."""
    (length,), row = scores.shape, int(np.prod(_packing.ROW))
    padded = jnp.pad(scores, (0, -length % row), constant_values=_top_k.EXCLUDED)
    padded = padded.reshape(-1, *_packing.ROW)
    k = jnp.minimum(number, _top_k.count_true(padded >= 0))
    one = RankingIds(np.zeros((), np.int32), np.zeros((), np.int32))
    (chosen,) = _top_k.top_k([padded], [one], k[None])
    at = _compaction.indices(chosen.reshape(-1)[:length], number)
    return at, jnp.arange(number, dtype=jnp.int32) < k


def _without(taken: CSRTopology | None, size: int) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """A function of scores of inputs from a first one on: those of stored weights excluded."""
    if taken is None:
        return lambda scores, first: scores
    t, inputs = taken, taken.shape[0]
    # What is beyond the chunk, or the list, is dropped.
    rows = jnp.pad(t.rows[t.order], (0, t.piece), constant_values=inputs + size)
    cols = jnp.pad(t.ordered_cols, (0, t.piece))

    def without(scores: jax.Array, first: jax.Array) -> jax.Array:
        def exclude(scores: jax.Array, at: jax.Array) -> jax.Array:
            own_rows, own_cols = (lax.dynamic_slice_in_dim(a, at, t.piece) for a in (rows, cols))
            return scores.at[own_rows - first, own_cols].set(_top_k.EXCLUDED, mode="drop")

        stop = t.row_starts[jnp.minimum(first + size, inputs)]
        return t.by_pieces(t.row_starts[first], stop, exclude, scores)

    return without
