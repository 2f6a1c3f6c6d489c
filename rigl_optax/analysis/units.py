"""Counts the connections of units, and the units that have lost all of them.

An argument `axes` says which axes of a kernel are inputs and outputs, as for a distribution;
windows are summed over.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rigl_optax import _axes, _distributions, _paths
from rigl_optax._axes import KernelAxes
from rigl_optax._types import PyTree


class DeadUnits(NamedTuple):
    """Numbers of units without connections in one layer.

    Attributes:
      inputs: int32 scalar: inputs that no output reads. In the first layer these are features that
        the network ignores, in a later one hidden units without effect.
      outputs: int32 scalar: output units without inputs; they are constant.
    """

    inputs: jax.Array
    outputs: jax.Array


@functools.partial(jax.jit, static_argnames="axes")
def fan_in(mask: jax.Array, axes: KernelAxes | None = None) -> jax.Array:
    """Counts the active weights into each output unit.

    Args:
      mask: Bool array (..., inputs, outputs), or with other axes if `axes` is given.
      axes: The axes of inputs and outputs, if they are not the last two.

    Returns:
      int32 array (outputs,), or of all axes that `axes` names as outputs.
    """
    return _summed(mask, _axes.or_last(axes, mask.ndim).outputs)


@functools.partial(jax.jit, static_argnames="axes")
def fan_out(mask: jax.Array, axes: KernelAxes | None = None) -> jax.Array:
    """Counts the active weights out of each input unit, such as a pixel.

    Args:
      mask: As in `fan_in`.
      axes: As in `fan_in`.

    Returns:
      int32 array (inputs,), or of all axes that `axes` names as inputs.
    """
    return _summed(mask, _axes.or_last(axes, mask.ndim).inputs)


def dead_units(
    masks: PyTree, *, axes: _axes.Axes = _axes.default_axes, stacked: Sequence[str] = ()
) -> dict[str, DeadUnits]:
    """Counts the dead inputs and outputs of every leaf with two dimensions or more.

    Use it to see whether sparsity cuts units off: a hidden unit is dead if it is a dead output of
    its layer or a dead input of the next.

    Args:
      masks: Tree of bool arrays, as `get_masks` returns it.
      axes: As in `uniform`: which axes are inputs.
      stacked: As in `uniform`; the units of all layers of a stack are counted.

    Returns:
      `{path: DeadUnits}`, without leaves that have fewer dimensions.

    Raises:
      ValueError: If a pattern of `stacked` matches no leaf.

    Examples:
      >>> mask = jnp.array([[True, False], [False, False], [True, False]])
      >>> dead = dead_units({"kernel": mask})["kernel"]
      >>> int(dead.inputs), int(dead.outputs)
      (1, 1)
    """
    stacks = _distributions.stacked_paths(masks, stacked)
    layouts = []
    for path, mask in _paths.flatten_with_paths(masks):
        if np.ndim(mask) - (path in stacks) >= 2:
            layouts.append((path, path in stacks, _axes.of_leaf(axes, path, mask, path in stacks)))
    # The axes are static, so they are found before tracing, from shapes.
    return _dead_units(masks, tuple(layouts))


@functools.partial(jax.jit, static_argnums=1)
def _dead_units(
    masks: PyTree, layouts: Sequence[tuple[str, bool, KernelAxes]]
) -> dict[str, DeadUnits]:
    named = dict(_paths.flatten_with_paths(masks))

    def dead(path: str, is_stack: bool, axes: tuple[int, ...]) -> jax.Array:
        active = _summed(named[path], (0, *axes) if is_stack else axes)
        return jnp.sum(active == 0, dtype=jnp.int32)

    return {
        path: DeadUnits(dead(path, is_stack, axes.inputs), dead(path, is_stack, axes.outputs))
        for path, is_stack, axes in layouts
    }


def _summed(mask: jax.Array, but: tuple[int, ...]) -> jax.Array:
    """Sums over all axes but these, which may be negative and come out in the given order."""
    kept = [a % mask.ndim for a in but]
    summed = [a for a in range(mask.ndim) if a not in kept]
    sums = jnp.sum(mask, axis=tuple(summed), dtype=jnp.int32)
    order = tuple(sorted(kept).index(a) for a in kept)
    return sums if order == tuple(range(len(order))) else sums.transpose(order)
