"""A least number of inputs for every unit: a unit without inputs is a constant, and lost.

The axes of the outputs of a kernel count its units, as `_axes` says; all other axes are inputs.
Under a structure, a column of groups is a unit, and its groups are its inputs.
"""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from rigl_optax import _axes
from rigl_optax._layout import Layout, SparseLeaf
from rigl_optax._ranking import _top_k
from rigl_optax._ranking._packing import Packing, Rows
from rigl_optax._types import Arrays

_FIRST = np.iinfo(np.int32).max  # before every score


def check(layout: Layout, min_fan_in: int) -> None:
    """Raises a ValueError if a layer has too few inputs, or active weights, for `min_fan_in`."""
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
    """Counts the active groups that each layer needs, at least one; int32 [rankings]."""
    each = [max(1, min_fan_in * _units(leaf)) for leaf in leaves]
    return np.repeat(np.asarray(each, np.int32), packing.layers)


def protected(
    scores: Arrays, leaves: Sequence[SparseLeaf], packing: Packing, min_fan_in: int
) -> Arrays:
    """Raises the scores of the best inputs of every unit above all others.

    Args:
      scores: int32 arrays as `packing` has them; -1 for inactive weights.
      leaves: Which axes of their grids count units.
      packing: How the leaves are laid out.
      min_fan_in: How many inputs of each unit, if it has as many.

    Returns:
      Arrays like `scores`.
    """
    return _raised(scores, leaves, packing, lambda open_, inputs: jnp.minimum(open_, min_fan_in))


def preferred(
    scores: Arrays, leaves: Sequence[SparseLeaf], packing: Packing, min_fan_in: int
) -> Callable[[Arrays], Arrays]:
    """Makes `prefer(kept) -> grow scores` in which what a unit lacks comes first.

    Args:
      scores: int32 growth scores as `packing` has them.
      leaves: As in `protected`.
      packing: How the leaves are laid out.
      min_fan_in: How many inputs a unit should have.

    Returns:
      The `prefer` of `_keep_and_grow.keep_and_grow`.
    """

    def prefer(kept: Arrays) -> Arrays:
        excluded = jnp.int32(_top_k.EXCLUDED)
        free = [jnp.where(k, excluded, s) for k, s in zip(kept, scores, strict=True)]
        # What is not free is kept.
        return _raised(
            free,
            leaves,
            packing,
            lambda open_, inputs: jnp.clip(min_fan_in - inputs + open_, 0, open_),
        )

    return prefer


def _raised(
    scores: Arrays,
    leaves: Sequence[SparseLeaf],
    packing: Packing,
    how_many: Callable[[jax.Array, jax.Array], jax.Array],
) -> Arrays:
    """Raises the scores of some of the best inputs of each unit above all others.

    `how_many(open inputs, all inputs)` says of how many, for each unit; open ones have a score.
    """
    # Units come first, behind the layers: an axis that is cut stays cut, and nothing is gathered.
    front = [leaf.stacked + len(leaf.unit_axes) for leaf in leaves]
    moves = [
        (leaf.unit_axes, range(leaf.stacked, n)) for leaf, n in zip(leaves, front, strict=True)
    ]
    unpacked = zip(packing.unpack(scores), moves, strict=True)
    by_unit = [jnp.moveaxis(x, there, here) for x, (there, here) in unpacked]
    rows = _unit_rows([x.shape[:n] for x, n in zip(by_unit, front, strict=True)])
    inputs = [math.prod(x.shape[r.ids.ndim :]) for x, r in zip(by_unit, rows, strict=True)]
    of_unit = np.repeat(np.asarray(inputs, np.int32), [r.ids.size for r in rows])
    k = how_many(_top_k.counts([x >= 0 for x in by_unit], rows), jnp.asarray(of_unit))
    best = _top_k.top_k(by_unit, rows, k)
    raised = [
        jnp.moveaxis(jnp.where(b, jnp.int32(_FIRST), x), here, there)
        for b, x, (there, here) in zip(best, by_unit, moves, strict=True)
    ]
    return packing.pack(raised, _top_k.EXCLUDED)


def _units(leaf: SparseLeaf) -> int:
    """Counts the units of one layer; under a structure, the columns of groups."""
    return _axes.size(leaf.grid, leaf.unit_axes) if leaf.grid[leaf.stacked :] else 1


def _unit_rows(shapes: Sequence[tuple[int, ...]]) -> list[Rows]:
    """Makes a ranking for each unit; the leading axes, of these shapes, count units."""
    ends = np.cumsum([math.prod(shape) for shape in shapes])
    ids = [
        np.arange(end - math.prod(shape), end, dtype=np.int32).reshape(shape)
        for shape, end in zip(shapes, ends, strict=True)
    ]
    return [Rows(each, np.zeros_like(each)) for each in ids]
