"""Chooses which units of a layer stay, and how many weights each has: the ablation of SRigL."""

import fractions
import itertools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from rigl_optax import _structures
from rigl_optax._layout import SparseLeaf
from rigl_optax._ranking import _top_k
from rigl_optax._ranking._packing import RankingIds
from rigl_optax._types import Arrays
from rigl_optax._xla import _sharding


def fan_ins(leaves: Sequence[SparseLeaf], salient: Arrays, active: Arrays) -> Arrays:
    """Returns the number of weights that each unit has after a rewiring.

    The number of a layer stays the same; `ConstantFanIn` says which units are ablated.

    Args:
      leaves: The sparse leaves.
      salient: int32 arrays, one for each leaf: number of salient weights of each of its rankings;
        in a layer at most as many as are active.
      active: int32 arrays of the same shapes: number of active weights; at least one in each layer.

    Returns:
      int32 arrays of the same shapes; 0 for ablated units. Leaves whose units cannot be ablated
      keep `active`.
    """
    which = [i for i, leaf in enumerate(leaves) if leaf.structure.min_salient]
    # A few numbers for each unit: gathered, so that every device decides on all units alike.
    scores = [_sharding.whole(salient[i]).reshape(leaves[i].layers, -1) for i in which]
    totals = [
        _sharding.whole(active[i]).reshape(leaves[i].layers, -1).sum(1, dtype=jnp.int32)
        for i in which
    ]
    staying = [
        _staying(leaves[i], score, total)
        for i, score, total in zip(which, scores, totals, strict=True)
    ]
    ends = np.cumsum([0, *(len(total) for total in totals)]).astype(np.int32)
    rows = [
        RankingIds(np.arange(first, end, dtype=np.int32), np.zeros(end - first, np.int32))
        for first, end in itertools.pairwise(ends)
    ]
    # Units are ranked by the same search as weights, so ties go to the lower index.
    total, number = jnp.concatenate(totals), jnp.concatenate(staying)
    stays = _top_k.top_k(scores, rows, number)
    with_one_more = _top_k.top_k(scores, rows, total % number)
    after = list(active)
    for i, row, stay, more in zip(which, rows, stays, with_one_more, strict=True):
        share = _top_k.spread(total // number, stay, row)
        fan_in = jnp.where(stay, share + more.astype(jnp.int32), 0)
        after[i] = _sharding.like(fan_in.reshape(active[i].shape), active[i])
    return after


def _staying(leaf: SparseLeaf, salient: jax.Array, total: jax.Array) -> jax.Array:
    """Returns the number of units that stay in each layer of a leaf, int32 [layers].

    These are the units with enough salient weights, and at least as many as can hold `total`
    weights.
    """
    assert isinstance(leaf.structure, _structures.ConstantFanIn)
    units = salient.shape[1]
    inputs = math.prod(leaf.grid[leaf.leading :])
    least = _times(total // units, leaf.structure.salient_share)
    enough = jnp.sum(salient >= jnp.maximum(least, 1)[:, None], axis=1, dtype=jnp.int32)
    return jnp.maximum(enough, (total - 1) // inputs + 1)


def _times(number: jax.Array, share: fractions.Fraction) -> jax.Array:
    """Returns `number * share`, rounded up."""
    # Quotient and remainder apart: `number * share.numerator` may overflow int32.
    whole, rest = number // share.denominator, number % share.denominator
    of_rest = (rest * share.numerator + share.denominator - 1) // share.denominator
    return whole * share.numerator + of_rest
