"""Shardings as types: what a mesh with explicit axes needs to be told, and no other.

There the sharding of an array is a part of its type. What is elementwise keeps it; arrays made
from nothing (draws, constants) are typed as whole, and what mixes entries of different devices
has to say where its result is to be. Everywhere else these functions return their argument.
"""

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


def _typed(x: Any) -> NamedSharding | None:
    sharding = jax.typeof(x).sharding
    is_explicit = not sharding.mesh.empty and AxisType.Explicit in sharding.mesh.axis_types
    return sharding if is_explicit else None
