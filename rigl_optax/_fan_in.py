"""A least number of inputs for every unit: a unit without inputs is a constant, and lost.

As in Flax and Haiku the last axis of a kernel counts its units; all other axes are inputs.
Under a structure, a column of groups is a unit, and its groups are its inputs.
"""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from rigl_optax import _selection
from rigl_optax._layout import Layout
from rigl_optax._packing import Packing

Arrays = list[jax.Array]

_FIRST = np.iinfo(np.int32).max  # before every score


def check(layout: Layout, min_fan_in: int) -> None:
    """Raises a ValueError if a layer has not enough inputs, or active weights, for it."""
    for leaf in layout.sparse:
        if leaf.structure.has_parts:
            raise ValueError(
                f"min_fan_in={min_fan_in}: {leaf.path!r} has {leaf.structure}, which says how many "
                "inputs each unit has"
            )
        shape = leaf.grid[leaf.stacked :]
        units = shape[-1] if shape else 1
        inputs = math.prod(shape) // max(units, 1)
        if min_fan_in > inputs:
            raise ValueError(
                f"min_fan_in={min_fan_in}: the units of {leaf.path!r} have {inputs} inputs"
            )
        active = None if leaf.zeros is None else math.prod(shape) - leaf.zeros
        if active is not None and min_fan_in * units > active:
            raise ValueError(
                f"min_fan_in={min_fan_in}: {leaf.path!r} has {active} active weights for "
                f"{units} units; at most {active // units}, or a lower sparsity there"
            )


def protected(scores: Arrays, packing: Packing, min_fan_in: int) -> Arrays:
    """Scores in which the best inputs of every unit come before everything else.

    Args:
      scores: int32 arrays as `packing` has them; -1 for inactive weights.
      packing: How the leaves are laid out.
      min_fan_in: How many inputs of each unit, if it has as many.

    Returns:
      Arrays like `scores`.
    """
    return _raised(scores, packing, lambda open_, inputs: jnp.minimum(open_, min_fan_in))


def preferred(scores: Arrays, packing: Packing, min_fan_in: int) -> Callable[[Arrays], Arrays]:
    """From what is kept to growth scores in which what a unit lacks comes first.

    Args:
      scores: int32 growth scores as `packing` has them.
      packing: How the leaves are laid out.
      min_fan_in: How many inputs a unit should have.

    Returns:
      A function for `_topology.keep_and_grow(prefer=...)`.
    """

    def prefer(kept: Arrays) -> Arrays:
        excluded = jnp.int32(_selection.EXCLUDED)
        free = [jnp.where(k, excluded, s) for k, s in zip(kept, scores, strict=True)]
        # What is not free is kept.
        return _raised(
            free, packing, lambda open_, inputs: jnp.clip(min_fan_in - inputs + open_, 0, open_)
        )

    return prefer


def _raised(
    scores: Arrays, packing: Packing, how_many: Callable[[jax.Array, int], jax.Array]
) -> Arrays:
    """Scores in which some of the best of each unit come first.

    `how_many` says how many, given how many have a score, and how many inputs there are.
    """
    leaves = _by_unit(packing.unpack(scores), packing)
    units = Packing(tuple(x.shape for x in leaves), (True,) * len(leaves), False)
    ks = [how_many(_selection.count_true(x >= 0, 1), x.shape[1]) for x in leaves]
    best = _selection.top_k(leaves, units.rows, jnp.concatenate(ks))
    raised = [jnp.where(b, jnp.int32(_FIRST), x) for b, x in zip(best, leaves, strict=True)]
    return packing.pack(_from_units(raised, packing), _selection.EXCLUDED)


def _by_unit(leaves: Sequence[jax.Array], packing: Packing) -> Arrays:
    """Each leaf as [units, inputs]; units of stacked layers one after the other."""
    return [
        jnp.moveaxis(x.reshape(layers, -1, x.shape[-1]), 2, 1).reshape(-1, x[0].size // x.shape[-1])
        if stacked
        else jnp.moveaxis(x.reshape(-1, x.shape[-1]), 1, 0)
        for x, stacked, layers in zip(leaves, packing.stacked, packing.layers, strict=True)
    ]


def _from_units(leaves: Sequence[jax.Array], packing: Packing) -> Arrays:
    """The inverse of `_by_unit`."""
    return [
        jnp.moveaxis(x.reshape(layers, -1, x.shape[-1]), 1, 2).reshape(shape)
        for x, shape, layers in zip(leaves, packing.shapes, packing.layers, strict=True)
    ]
