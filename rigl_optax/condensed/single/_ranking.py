"""Lists the weights of a layer that a rewiring chooses from: the stored ones and the candidates.

Candidates are the best places without a weight. As many are listed as a rewiring may grow, so a
place that is left out would not be chosen. The list is in the order of the dense kernel: equal
scores are then told apart by the lower index, as in the masked form.
"""

from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from rigl_optax._ranking import _random, _top_k
from rigl_optax.condensed import _compaction
from rigl_optax.condensed._topology import Move, RandomGrowth, Ranking
from rigl_optax.condensed.single import _candidates, _csr
from rigl_optax.condensed.single._candidates import Candidates
from rigl_optax.condensed.single._csr import Probe, SampleProbe

if TYPE_CHECKING:  # whose `rank` calls this module
    from rigl_optax.condensed.single._csr_topology import CSRTopology


class _Gradients(NamedTuple):
    """The gradients of the listed weights."""

    stored: jax.Array  # float32 [n]: scores of the stored weights, by input and output
    candidates: Candidates
    is_valid: jax.Array  # as in `Ranking`


def rank(
    t: "CSRTopology",
    values: jax.Array,
    of_values: jax.Array,
    scores: Probe | SampleProbe,
    growth: RandomGrowth | None,
) -> Ranking:
    """Lists the stored weights and the candidates of a layer."""
    if growth is not None:
        gradients = _random_places(t, of_values, growth)
    elif isinstance(scores, SampleProbe):
        gradients = _from_sample(t, of_values, scores)
    else:
        gradients = _from_probe(t, scores)
    stored, candidates = t.places(), gradients.candidates
    length = t.number + t.replaceable
    # A candidate's index in the list: as many candidates come before it, and stored weights.
    before = jnp.searchsorted(stored, candidates.places).astype(jnp.int32)
    new = before + jnp.arange(t.replaceable, dtype=jnp.int32)
    mask = jnp.ones(length, bool).at[new].set(False)
    old = _compaction.indices(mask, t.number)

    def merged(of_old: jax.Array, of_new: jax.Array) -> jax.Array:
        return jnp.zeros(length, of_old.dtype).at[old].set(of_old).at[new].set(of_new)

    indices = merged(stored, candidates.places)
    old_index = merged(t.order, jnp.full(t.replaceable, -1, jnp.int32))

    def move(mask: jax.Array) -> Move:
        chosen = _compaction.indices(mask, t.number)
        topology = t.with_places(indices[chosen])
        # `chosen` is sorted by input, stored values by output.
        source = jnp.zeros_like(chosen).at[topology.order].set(old_index[chosen])
        return Move(topology, jnp.maximum(source, 0), source >= 0)

    return Ranking(
        weights=merged(values[t.order].astype(jnp.float32), jnp.zeros(t.replaceable, jnp.float32)),
        gradients=merged(
            gradients.stored, lax.bitcast_convert_type(candidates.scores, jnp.float32)
        ),
        mask=mask,
        indices=indices,
        is_valid=gradients.is_valid,
        move=move,
    )


def _from_probe(t: "CSRTopology", scores: Probe) -> _Gradients:
    """Reads scores and candidates from the gradient of the probe."""
    if scores.scores.shape != (t.replaceable,):
        raise ValueError(
            f"scores of {scores.scores.shape[0]} places, where {t.replaceable} weights can be "
            "replaced: take them with the topologies of the state"
        )
    rows, cols = (a.astype(jnp.int32) for a in (scores.rows, scores.cols))
    found = lax.bitcast_convert_type(scores.scores, jnp.int32)
    is_valid = _csr.checksum(rows, cols) == scores.checksum
    return _Gradients(scores.stored, Candidates(found, rows * t.shape[1] + cols), is_valid)


def _from_sample(t: "CSRTopology", of_values: jax.Array, scores: SampleProbe) -> _Gradients:
    """Lists the sample. What is stored already gets an index behind the layer: no candidate."""
    if t.sample is None or scores.scores.shape != (t.replaceable,):
        raise ValueError(
            f"scores of {scores.scores.shape[0]} places, where {t.replaceable} are sampled: take "
            "them with the topologies of the state"
        )
    sampled, stored = t.sample.places(), t.places()
    at = jnp.minimum(jnp.searchsorted(stored, sampled), stored.size - 1)
    behind = t.sample.size + jnp.arange(sampled.size, dtype=jnp.int32)
    places = jnp.where(stored[at] == sampled, behind, sampled)
    magnitudes = _top_k.magnitude_scores(scores.scores)
    places, magnitudes = lax.sort((places, magnitudes), num_keys=1)
    of_stored = of_values[t.order].astype(jnp.float32)
    return _Gradients(of_stored, Candidates(magnitudes, places), jnp.ones((), bool))


def _random_places(t: "CSRTopology", of_values: jax.Array, growth: RandomGrowth) -> _Gradients:
    """Draws candidates: the places of largest score, by the scores that the rule will draw."""
    purpose, (seed, position, count) = _random.Purpose.GROWTH, growth
    found = _candidates.at_random(seed, purpose, position, count, t.shape, t.replaceable, t)
    # The rule draws the scores once more for the listed indices; candidates have no gradients.
    unused = Candidates(jnp.zeros_like(found.scores), found.places)
    return _Gradients(of_values[t.order].astype(jnp.float32), unused, jnp.ones((), bool))
