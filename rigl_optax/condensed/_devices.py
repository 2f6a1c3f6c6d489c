"""Products on several devices, each with its own part of the batch.

In a `jax.shard_map` the type of an array says over which axes of the mesh it differs from device
to device. There the gradient of what is the same on all devices is a sum over them: written out
for our own derivatives. Scores are of that sum, so it is taken before they are.

Under explicit axes types say how a batch is cut, and products are made in such a map: nothing
crosses devices but sums. Under auto axes types say nothing and the compiler decides.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from rigl_optax._types import PyTree


def zeros(shape: tuple[int, ...], dtype: jax.typing.DTypeLike, *like: jax.Array) -> jax.Array:
    """Zeros that differ over devices as far as types go: what a loop over `like` adds to."""
    return functools.reduce(lax.add, [lax.full_like(x, 0, dtype, shape) for x in like])


def differing(x: jax.Array, *like: jax.Array) -> jax.Array:
    """An array that differs over devices as far as the others do."""
    missing = frozenset().union(*map(_varying, like)) - _varying(x)
    return x + zeros((), x.dtype, *like) if missing else x


def summed(gradient: jax.Array, of: jax.Array) -> jax.Array:
    """A gradient added up over the devices on which it differs, but what it is of does not."""
    axes = _varying(gradient) - _varying(of)
    return lax.psum(gradient, tuple(sorted(axes))) if axes else gradient


def examples(x: jax.Array, *features: int) -> PartitionSpec | None:
    """How an array is cut, with its axes `features` whole; None where types do not say."""
    sharding = jax.typeof(x).sharding
    if not _explicit_axes(sharding.mesh):
        return None
    return PartitionSpec(*(None if i in features else s for i, s in enumerate(sharding.spec)))


def by_parts(function: Callable[..., PyTree], in_specs: PyTree, out_specs: PyTree) -> Any:
    """A function of the parts that each device has, under explicit axes.

    Args:
      function: Of arrays; the same on every device.
      in_specs: Prefix of its arguments: how each is cut. What is not there is brought there.
      out_specs: How its results are cut.

    Returns:
      The function of whole arrays.
    """

    def whole(*args: PyTree) -> PyTree:
        mesh = jax.sharding.get_abstract_mesh()
        placed = jax.tree.map(
            lambda spec, part: jax.tree.map(
                lambda x: jax.sharding.reshard(x, NamedSharding(mesh, spec)), part
            ),
            in_specs,
            args,
            is_leaf=lambda x: isinstance(x, PartitionSpec),
        )
        mapped = jax.shard_map(
            function,
            in_specs=in_specs,
            out_specs=out_specs,
            axis_names=set(_explicit_axes(mesh)),
        )
        return mapped(*placed)

    return whole


def by_compiler(function: Callable[..., PyTree], like: PyTree) -> Callable[..., PyTree]:
    """A function within which there are no explicit axes; its results are cut as `like`."""
    mesh = jax.sharding.get_abstract_mesh()
    explicit = _explicit_axes(mesh)
    if not explicit:
        return function
    places = jax.tree.map(lambda x: NamedSharding(mesh, jax.typeof(x).sharding.spec), like)
    return jax.sharding.auto_axes(function, axes=explicit, out_sharding=places)


def _explicit_axes(mesh: AbstractMesh) -> tuple[str, ...]:
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return tuple(name for name, kind in kinds if kind == AxisType.Explicit)


def _varying(x: jax.Array) -> frozenset[str]:
    """The axes of a `shard_map` over which an array differs from device to device."""
    kind: Any = jax.typeof(x)
    # JAX 0.10 moved it.
    return kind.mat.varying if hasattr(kind, "mat") else kind.vma
