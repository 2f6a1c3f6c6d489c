"""Shardings as types: what a mesh with explicit axes needs to be told, and no other.

There the sharding of an array is a part of its type. What is elementwise keeps it; arrays made
from nothing (draws, constants) are typed as whole, and what mixes entries of different devices
has to say where its result is to be. Everywhere else these functions return their argument.
"""

import math
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec, reshard


def like(x: jax.Array, leaf: Any) -> jax.Array:
    """`x`, of the shape of a leaf, placed as its type says."""
    sharding = _typed(leaf)
    return x if sharding is None else reshard(x, sharding)


def whole(x: jax.Array) -> jax.Array:
    """`x` on every device: gathered, if it is in parts."""
    sharding = _typed(x)
    return x if sharding is None else reshard(x, NamedSharding(sharding.mesh, PartitionSpec()))


def gathered(x: jax.Array, axis: int) -> jax.Array:
    """`x` with an axis whole on every device."""
    sharding = _typed(x)
    if sharding is None or _parts(sharding, axis) == 1:
        return x
    spec = list(sharding.spec)
    spec[axis] = None
    return reshard(x, NamedSharding(sharding.mesh, PartitionSpec(*spec)))


def split(x: jax.Array, axis: int, size: int) -> jax.Array:
    """`x` with an axis in groups of `size`, [..., groups, size, ...], that stay where they are.

    The axis is gathered where a group would lie on several devices.
    """
    number = x.shape[axis] // size
    sharding = _typed(x)
    if sharding is not None and number % _parts(sharding, axis):
        x = gathered(x, axis)
    return x.reshape(*x.shape[:axis], number, size, *x.shape[axis + 1 :])


def _parts(sharding: NamedSharding, axis: int) -> int:
    """In how many parts an axis is."""
    names = sharding.spec[axis]
    if names is None:
        return 1
    names = names if isinstance(names, tuple) else (names,)
    return math.prod(sharding.mesh.shape[name] for name in names)


def _typed(x: Any) -> NamedSharding | None:
    sharding = jax.typeof(x).sharding
    is_explicit = not sharding.mesh.empty and AxisType.Explicit in sharding.mesh.axis_types
    return sharding if is_explicit else None
