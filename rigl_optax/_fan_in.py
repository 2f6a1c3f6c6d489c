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
from rigl_optax._layout import Layout, SparseLeaf
from rigl_optax._packing import Packing, Rows

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
        shape, units = leaf.grid[leaf.stacked :], _units(leaf)
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


def least(leaves: Sequence[SparseLeaf], packing: Packing, min_fan_in: int) -> np.ndarray:
    """Active groups that each layer needs for it, and at least one; int32 [rankings]."""
    each = [max(1, min_fan_in * _units(leaf)) for leaf in leaves]
    return np.repeat(np.asarray(each, np.int32), packing.layers)


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
    scores: Arrays, packing: Packing, how_many: Callable[[jax.Array, jax.Array], jax.Array]
) -> Arrays:
    """Scores in which some of the best of each unit come first.

    `how_many` says of each how many, given how many have a score, and how many inputs there are.
    """
    # Units come first, behind the layers: an axis that is cut stays cut, and nothing is gathered.
    leaves = [
        jnp.moveaxis(x, -1, int(stacked))
        for x, stacked in zip(packing.unpack(scores), packing.leading, strict=True)
    ]
    rows = _unit_rows([x.shape[: 1 + s] for x, s in zip(leaves, packing.leading, strict=True)])
    inputs = [math.prod(x.shape[r.ids.ndim :]) for x, r in zip(leaves, rows, strict=True)]
    of_unit = np.repeat(np.asarray(inputs, np.int32), [r.ids.size for r in rows])
    k = how_many(_selection.counts([x >= 0 for x in leaves], rows), jnp.asarray(of_unit))
    best = _selection.top_k(leaves, rows, k)
    raised = [
        jnp.moveaxis(jnp.where(b, jnp.int32(_FIRST), x), int(stacked), -1)
        for b, x, stacked in zip(best, leaves, packing.leading, strict=True)
    ]
    return packing.pack(raised, _selection.EXCLUDED)


def _units(leaf: SparseLeaf) -> int:
    """Number of units of one layer; under a structure, of columns of groups."""
    shape = leaf.grid[leaf.stacked :]
    return shape[-1] if shape else 1


def _unit_rows(shapes: Sequence[tuple[int, ...]]) -> list[Rows]:
    """For leading axes of these shapes, a ranking for each unit."""
    ends = np.cumsum([math.prod(shape) for shape in shapes])
    ids = [
        np.arange(end - math.prod(shape), end, dtype=np.int32).reshape(shape)
        for shape, end in zip(shapes, ends, strict=True)
    ]
    return [Rows(each, np.zeros_like(each)) for each in ids]
