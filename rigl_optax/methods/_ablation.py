"""Which units of a layer stay, and how many weights each of them has: the ablation of SRigL."""

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
from rigl_optax._ranking._packing import Rows
from rigl_optax._types import Arrays
from rigl_optax._xla import _sharding


def fan_ins(leaves: Sequence[SparseLeaf], salient: Arrays, active: Arrays) -> Arrays:
    """How many weights each unit is to have, of as many in each layer as it has.

    Args:
      leaves: The sparse leaves.
      salient: Of each leaf the salient weights of its rankings, int32; at most as many in a layer
        as are active.
      active: Active weights, in the same shapes; at least one in each layer.

    Returns:
      int32 arrays of the same shapes: of leaves whose units may be ablated as `ConstantFanIn` says,
      0 for those that are; of other leaves `active`.
    """
    which = [i for i, leaf in enumerate(leaves) if leaf.structure.min_salient]
    # Few numbers: all devices decide on all units, and agree.
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
        Rows(np.arange(first, end, dtype=np.int32), np.zeros(end - first, np.int32))
        for first, end in itertools.pairwise(ends)
    ]
    # The most salient units, of equal ones the first: the search that ranks weights finds them.
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
    """Number of units that stay in each layer of a leaf, int32 [layers].

    Those with enough salient weights, but as many as it takes to hold `total` weights.
    """
    assert isinstance(leaf.structure, _structures.ConstantFanIn)
    units = salient.shape[1]
    inputs = math.prod(leaf.grid[leaf.leading :])
    least = _times(total // units, leaf.structure.salient_share)
    enough = jnp.sum(salient >= jnp.maximum(least, 1)[:, None], axis=1, dtype=jnp.int32)
    return jnp.maximum(enough, (total - 1) // inputs + 1)


def _times(number: jax.Array, share: fractions.Fraction) -> jax.Array:
    """`number * share`, rounded up; in int32, which does not overflow."""
    whole, rest = number // share.denominator, number % share.denominator
    of_rest = (rest * share.numerator + share.denominator - 1) // share.denominator
    return whole * share.numerator + of_rest
