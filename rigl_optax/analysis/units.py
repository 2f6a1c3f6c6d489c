"""Units that lost all their connections, and how many each has.

A kernel's last axis counts output units and the one before input units, as in Flax and Haiku
(IO, HWIO); other axes (windows, stacked layers) are summed over.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rigl_optax import _paths

PyTree = Any


class DeadUnits(NamedTuple):
    """Units without connections in one layer.

    Attributes:
      inputs: int32 scalar: inputs that no output reads. In the first layer, features the network
        ignores; in a later one, hidden units without effect.
      outputs: int32 scalar: output units that read nothing: constants.
    """

    inputs: jax.Array
    outputs: jax.Array


@jax.jit
def fan_in(mask: jax.Array) -> jax.Array:
    """Active weights into each output unit.

    Args:
      mask: Bool, (..., inputs, outputs).

    Returns:
      int32, (outputs,).
    """
    return jnp.sum(mask, axis=range(mask.ndim - 1), dtype=jnp.int32)


@jax.jit
def fan_out(mask: jax.Array) -> jax.Array:
    """Active weights out of each input unit: live connections of a pixel, say.

    Args:
      mask: Bool, (..., inputs, outputs).

    Returns:
      int32, (inputs,).
    """
    return jnp.sum(mask, axis=(*range(mask.ndim - 2), mask.ndim - 1), dtype=jnp.int32)


@jax.jit
def dead_units(masks: PyTree) -> dict[str, DeadUnits]:
    """Dead inputs and outputs of every leaf with two dimensions or more.

    A hidden unit is dead if it is a dead output of its layer or a dead input of the next.

    Args:
      masks: Tree of bool arrays, as `get_masks` returns it.

    Returns:
      `{path: DeadUnits}`; leaves with fewer dimensions are not in it.

    Example:
      >>> mask = jnp.array([[True, False], [False, False], [True, False]])
      >>> dead = dead_units({"kernel": mask})["kernel"]
      >>> int(dead.inputs), int(dead.outputs)
      (1, 1)
    """
    return {
        path: DeadUnits(
            jnp.sum(fan_out(mask) == 0, dtype=jnp.int32),
            jnp.sum(fan_in(mask) == 0, dtype=jnp.int32),
        )
        for path, mask in _paths.flatten_with_paths(masks)
        if mask.ndim >= 2
    }
