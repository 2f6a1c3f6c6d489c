"""Places arrays on meshes with explicit axes, where the sharding is a part of an array's type.

There an elementwise operation keeps the sharding, a new array (a draw, a constant) is typed as not
sharded, and an operation that mixes entries of several devices raises unless its operands are
placed first (`tests/core/test_sharding.py`, with `AxisType.Explicit`). On all other meshes, and on
one device, these functions change nothing.
"""

import math
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec, reshard


def like(x: jax.Array, leaf: Any) -> jax.Array:
    """Returns `x`, an array of the leaf's shape, with the leaf's sharding."""
    sharding = _typed(leaf)
    return x if sharding is None else reshard(x, sharding)


def whole(x: jax.Array) -> jax.Array:
    """Returns `x` with all of it on every device; gathers it if it is sharded."""
    sharding = _typed(x)
    return x if sharding is None else reshard(x, NamedSharding(sharding.mesh, PartitionSpec()))


def gathered(x: jax.Array, axis: int) -> jax.Array:
    """Returns `x` with all of one axis on every device."""
    sharding = _typed(x)
    if sharding is None or _parts(sharding, axis) == 1:
        return x
    spec = list(sharding.spec)
    spec[axis] = None
    return reshard(x, NamedSharding(sharding.mesh, PartitionSpec(*spec)))


def split(x: jax.Array, axis: int, size: int) -> jax.Array:
    """Splits an axis into groups: [..., groups, size, ...].

    Args:
      x: Any array.
      axis: The axis to split.
      size: Length of a group; divides the axis.

    Returns:
      `x`, reshaped; the groups stay on their devices, unless one would lie on several.
    """
    number = x.shape[axis] // size
    sharding = _typed(x)
    # The reshape raises unless the groups divide evenly between the devices.
    if sharding is not None and number % _parts(sharding, axis):
        x = gathered(x, axis)
    return x.reshape(*x.shape[:axis], number, size, *x.shape[axis + 1 :])


def _parts(sharding: NamedSharding, axis: int) -> int:
    """Returns the number of parts that an axis is sharded into."""
    names = sharding.spec[axis]
    if names is None:
        return 1
    names = names if isinstance(names, tuple) else (names,)
    return math.prod(sharding.mesh.shape[name] for name in names)


def _typed(x: Any) -> NamedSharding | None:
    """Returns the sharding in the type of `x`; None if no axis of its mesh is explicit."""
    sharding = jax.typeof(x).sharding
    is_explicit = not sharding.mesh.empty and AxisType.Explicit in sharding.mesh.axis_types
    return sharding if is_explicit else None
