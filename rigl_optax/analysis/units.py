"""Units that lost all their connections, and how many each has.

Which axes of a kernel count its output units and its input units is asked of `axes`, as for a
distribution; windows are summed over.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rigl_optax import _axes, _distributions, _paths
from rigl_optax._axes import KernelAxes
from rigl_optax._types import PyTree


class DeadUnits(NamedTuple):
    """Units without connections in one layer.

    Attributes:
      inputs: int32 scalar: inputs that no output reads. In the first layer, features the network
        ignores; in a later one, hidden units without effect.
      outputs: int32 scalar: output units that read nothing: constants.
    """

    inputs: jax.Array
    outputs: jax.Array


@functools.partial(jax.jit, static_argnames="axes")
def fan_in(mask: jax.Array, axes: KernelAxes | None = None) -> jax.Array:
    """Active weights into each output unit.

    Args:
      mask: Bool, (..., inputs, outputs), or as `axes` says.
      axes: Which axes are inputs and outputs, if not the last two.

    Returns:
      int32, (outputs,), or as many axes as there are of outputs.
    """
    return _summed(mask, _axes.or_last(axes, mask.ndim).outputs)


@functools.partial(jax.jit, static_argnames="axes")
def fan_out(mask: jax.Array, axes: KernelAxes | None = None) -> jax.Array:
    """Active weights out of each input unit: live connections of a pixel, say.

    Args:
      mask: As in `fan_in`.
      axes: As in `fan_in`.

    Returns:
      int32, (inputs,), or as many axes as there are of inputs.
    """
    return _summed(mask, _axes.or_last(axes, mask.ndim).inputs)


def dead_units(
    masks: PyTree, *, axes: _axes.Axes = _axes.default_axes, stacked: Sequence[str] = ()
) -> dict[str, DeadUnits]:
    """Dead inputs and outputs of every leaf with two dimensions or more.

    A hidden unit is dead if it is a dead output of its layer or a dead input of the next.

    Args:
      masks: Tree of bool arrays, as `get_masks` returns it.
      axes: As in `uniform`: which axes are inputs.
      stacked: As in `uniform`: units of all layers in such a leaf are counted.

    Returns:
      `{path: DeadUnits}`; leaves with fewer dimensions are not in it.

    Example:
      >>> mask = jnp.array([[True, False], [False, False], [True, False]])
      >>> dead = dead_units({"kernel": mask})["kernel"]
      >>> int(dead.inputs), int(dead.outputs)
      (1, 1)
    """
    stacks = _distributions.stacked_paths(masks, stacked)
    layouts = []
    for path, mask in _paths.flatten_with_paths(masks):
        if mask.ndim - (path in stacks) >= 2:
            layouts.append((path, path in stacks, _axes.of_leaf(axes, path, mask, path in stacks)))
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
    """Sums over all axes but these, which come out in this order; they may be negative."""
    kept = [a % mask.ndim for a in but]
    summed = [a for a in range(mask.ndim) if a not in kept]
    found = jnp.sum(mask, axis=tuple(summed), dtype=jnp.int32)
    order = tuple(sorted(kept).index(a) for a in kept)
    return found if order == tuple(range(len(order))) else found.transpose(order)
