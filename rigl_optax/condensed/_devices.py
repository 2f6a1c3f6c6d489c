"""Products on several devices, each with its own part of the batch.

In a `jax.shard_map` the type of an array names the axes of the mesh over which it differs from
device to device. The gradient of weights that are the same on all devices is a sum over these axes.
JAX adds it up for its own derivatives; for ours, `summed` does. Scores are those of the sum, so
the gradient is summed first.

Under explicit axes types say how a batch is cut, and `by_parts` puts products into such a map:
only sums cross devices. Under auto axes types say nothing, and the compiler decides.
`tests/condensed/test_sharded.py` counts what crosses.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from rigl_optax._types import PyTree


def zeros(shape: tuple[int, ...], dtype: jax.typing.DTypeLike, *like: jax.Array) -> jax.Array:
    """Makes zeros whose type differs over devices as those of `like` do together.

    A loop needs such a first value: the type of what it carries must not change.
    """
    return functools.reduce(lax.add, [lax.full_like(x, 0, dtype, shape) for x in like])


def shaped(
    shape: tuple[int, ...], dtype: jax.typing.DTypeLike, *like: jax.Array
) -> jax.ShapeDtypeStruct:
    """Returns the type of an array that differs over devices as those of `like` do together."""
    kind: Any = jax.typeof(zeros((), dtype, *like))
    if hasattr(kind, "mat"):  # as in `_varying`
        return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=kind.mat)
    return jax.ShapeDtypeStruct(shape, dtype, **{"vma": kind.vma})


def differs(*arrays: jax.Array) -> bool:
    """Returns whether the type of any of these arrays differs over devices."""
    return any(map(_varying, arrays))


def differing(x: jax.Array, *like: jax.Array) -> jax.Array:
    """Returns `x`, with a type that differs over devices at least as those of `like` do."""
    missing = frozenset().union(*map(_varying, like)) - _varying(x)
    return x + zeros((), x.dtype, *like) if missing else x


def summed(gradient: jax.Array, primal: jax.Array) -> jax.Array:
    """Adds up a gradient over the axes over which it differs and its primal does not."""
    axes = _varying(gradient) - _varying(primal)
    return lax.psum(gradient, tuple(sorted(axes))) if axes else gradient


def examples(x: jax.Array, *features: int) -> PartitionSpec | None:
    """Returns how an array is cut, but for its axes `features`; None where types do not say."""
    sharding = jax.typeof(x).sharding
    if not _explicit_axes(sharding.mesh):
        return None
    return PartitionSpec(*(None if i in features else s for i, s in enumerate(sharding.spec)))


def by_parts(function: Callable[..., PyTree], in_specs: PyTree, out_specs: PyTree) -> Any:
    """Makes each device apply a function to its own parts of arrays, under explicit axes.

    Args:
      function: A function of arrays.
      in_specs: How arguments are cut, a prefix of their tree; arrays that are cut otherwise are
        resharded.
      out_specs: How results are cut.

    Returns:
      The function, of whole arrays.
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
    """Turns explicit axes into auto ones within a function; its results are cut as `like`."""
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
    """Returns the axes of a `shard_map` over which an array differs from device to device."""
    kind: Any = jax.typeof(x)
    # `vma` is `mat.varying` since JAX 0.10.
    return kind.mat.varying if hasattr(kind, "mat") else kind.vma
