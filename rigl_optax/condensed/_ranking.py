"""What a rewiring ranks of a layer, and where stored values go: blocks and single weights alike.

Of blocks the whole grid is ranked. Of single weights a list: those that are stored and the best of
all others, in the order of the dense kernel, so that equal scores are told apart as there. What is
left out would not have been chosen.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from rigl_optax import _structures
from rigl_optax._layout import SparseLeaf
from rigl_optax._ranking import _random
from rigl_optax._types import Seed
from rigl_optax.condensed import _compaction
from rigl_optax.condensed.blocks import _topology
from rigl_optax.condensed.blocks._topology import Topology
from rigl_optax.condensed.single import _candidates, _csr, _csr_topology
from rigl_optax.condensed.single._candidates import Candidates
from rigl_optax.condensed.single._csr import Probe
from rigl_optax.condensed.single._csr_topology import CSRTopology


class Moved(NamedTuple):
    """Where the groups of a layer are now, and where they were."""

    topology: Topology | CSRTopology
    source: jax.Array  # int32 [groups]: where a group was; anything where it is new
    is_kept: jax.Array  # bool [groups]

    def carry(self, values: jax.Array, elsewhere: jax.Array) -> jax.Array:
        """Values of kept groups in their new order; others are as `elsewhere`."""
        is_kept = self.is_kept.reshape(-1, *(1,) * (values.ndim - 1))
        return jnp.where(is_kept, values[self.source], elsewhere)


class Ranked(NamedTuple):
    """What the rule sees of a layer, all of one shape, and what a new mask of it means."""

    weights: jax.Array  # float32, of any sign
    gradients: jax.Array  # float32, of any sign
    mask: jax.Array  # bool
    indices: jax.Array  # int32: which group of the layer each is
    is_sound: jax.Array  # bool scalar: whether these are what they should be
    move: Callable[[jax.Array], Moved]


class Proposal(NamedTuple):
    """Where a layer of single weights may grow, and what its stored weights would score there."""

    stored: jax.Array  # float32 [n], by input and output
    candidates: Candidates
    is_sound: jax.Array


# From a topology, the gradient of its probe, the position of the leaf and the count.
Propose = Callable[[CSRTopology, Probe, int, jax.Array], Proposal]


def by_gradient(t: CSRTopology, seen: Probe, position: int, count: jax.Array) -> Proposal:
    """As the probe says."""
    del position, count
    if seen.scores.shape != (t.replaceable,):
        raise ValueError(
            f"scores of {seen.scores.shape[0]} places, where {t.replaceable} weights can be "
            "replaced: take them with the topologies of the state"
        )
    rows, cols = (a.astype(jnp.int32) for a in (seen.rows, seen.cols))
    is_sound = _csr.checksum(rows, cols) == seen.checksum
    scores = lax.bitcast_convert_type(seen.scores, jnp.int32)
    return Proposal(seen.stored, Candidates(scores, rows * t.shape[1] + cols), is_sound)


def at_random(seed: Seed) -> Propose:
    """What a rule with `_growth.random_scores(seed)` would choose from; it draws the scores."""

    def propose(t: CSRTopology, seen: Probe, position: int, count: jax.Array) -> Proposal:
        del seen
        purpose = _random.Purpose.GROWTH
        found = _candidates.at_random(seed, purpose, position, count, t.shape, t.replaceable, t)
        unseen = Candidates(jnp.zeros_like(found.scores), found.places)
        return Proposal(jnp.zeros(t.values_shape, jnp.float32), unseen, jnp.ones((), bool))

    return propose


def leaf(path: str, position: int, t: Topology | CSRTopology) -> SparseLeaf:
    """A layer as the masked form knows it, its grid what is ranked."""
    if isinstance(t, CSRTopology):
        grid, structure = (t.number + t.replaceable,), _structures.UNSTRUCTURED
        return SparseLeaf(path, position, False, t.replaceable, structure, t.shape, grid)
    zeros = t.grid[0] * t.grid[1] - t.blocks
    return SparseLeaf(path, position, False, zeros, t.block, t.shape, t.grid)


def check(t: Topology | CSRTopology, path: str, min_fan_in: int) -> None:
    """Raises a ValueError if a layer cannot be rewired."""
    if not isinstance(t, CSRTopology):
        return
    _csr_topology.check_shape(t.shape, path)
    if not t.number:
        raise ValueError(f"{path!r}: its topology stores nothing")
    if min_fan_in:
        raise ValueError(
            f"min_fan_in={min_fan_in}: {path!r} is stored as single weights, which grow where "
            "their scores are largest; leave it 0"
        )


def bounded(t: Topology | CSRTopology, fraction: float) -> Topology | CSRTopology:
    """A topology whose rewirings replace no more than this fraction of its weights."""
    if not isinstance(t, CSRTopology):
        return t
    # Drops are counted in float32, which may round up.
    most = int(t.number * fraction * (1 + 1e-6)) + 1
    return dataclasses.replace(t, replaceable=min(t.replaceable, most))


def of_blocks(t: Topology, values: jax.Array, scores: jax.Array) -> Ranked:
    """The grid of a layer of blocks."""
    each = t.block.score(values, tuple(range(1, values.ndim)), t.sizes())

    def move(mask: jax.Array) -> Moved:
        new = _topology.from_mask(mask, t.blocks, t.shape, t.block)
        slots = jnp.full(t.grid, -1, jnp.int32)
        slots = slots.at[t.rows, t.cols].set(jnp.arange(t.blocks, dtype=jnp.int32))
        source = slots[new.rows, new.cols]
        return Moved(new, jnp.maximum(source, 0), source >= 0)

    return Ranked(
        weights=jnp.zeros(t.grid, jnp.float32).at[t.rows, t.cols].set(each),
        gradients=scores.astype(jnp.float32),
        mask=t.mask(),
        indices=jnp.arange(t.grid[0] * t.grid[1], dtype=jnp.int32).reshape(t.grid),
        is_sound=jnp.ones((), bool),
        move=move,
    )


def of_weights(t: CSRTopology, values: jax.Array, proposal: Proposal) -> Ranked:
    """The list of a layer of single weights."""
    stored, candidates = t.places(), proposal.candidates
    length = t.number + t.replaceable
    # The place of a candidate in the list: as many candidates before it, and stored weights.
    before = jnp.searchsorted(stored, candidates.places).astype(jnp.int32)
    new = before + jnp.arange(t.replaceable, dtype=jnp.int32)
    mask = jnp.ones(length, bool).at[new].set(False)
    old = _compaction.indices(mask, t.number)

    def merged(of_old: jax.Array, of_new: jax.Array) -> jax.Array:
        return jnp.zeros(length, of_old.dtype).at[old].set(of_old).at[new].set(of_new)

    indices = merged(stored, candidates.places)
    slots = merged(t.order, jnp.full(t.replaceable, -1, jnp.int32))

    def move(mask: jax.Array) -> Moved:
        chosen = _compaction.indices(mask, t.number)
        topology = _csr_topology.from_places(indices[chosen], t.shape, t.replaceable)
        source = jnp.zeros_like(chosen).at[topology.order].set(slots[chosen])
        return Moved(topology, jnp.maximum(source, 0), source >= 0)

    return Ranked(
        weights=merged(values[t.order].astype(jnp.float32), jnp.zeros(t.replaceable, jnp.float32)),
        gradients=merged(proposal.stored, lax.bitcast_convert_type(candidates.scores, jnp.float32)),
        mask=mask,
        indices=indices,
        is_sound=proposal.is_sound,
        move=move,
    )
