"""Finds which axes of a kernel are inputs, for everything that counts units or fan-in.

Inside the library a kernel of one layer is [*window, in, out]; other layouts are transposed to it.
"""

import math
import numbers
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from rigl_optax._xla import _sharding


class KernelAxes(NamedTuple):
    """The axes of a leaf that are inputs and those that are outputs; all others are a window.

    Axes may be negative, as in NumPy. Several axes of one kind count together: an attention kernel
    (embed, heads, head_dim) has heads * head_dim units.

    Attributes:
      inputs: Axes of the inputs.
      outputs: Axes of the outputs, the units.

    Examples:
      >>> import jax.numpy as jnp, optax, rigl_optax
      >>> from rigl_optax import ConstantFanIn, KernelAxes
      >>> half = rigl_optax.uniform(0.5, axes=lambda path, leaf: KernelAxes((1,), (0,)))
      >>> tx = rigl_optax.static_sparse(optax.sgd(0.1), half, structure=ConstantFanIn())
      >>> tx.init({"table": jnp.ones((3, 8))}).masks["table"].sum(1).tolist()
      [4, 4, 4]
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


# `axes(path, leaf) -> KernelAxes`, where `leaf` has a shape; for a stacked leaf, that of one slice.
Axes = Callable[[str, Any], KernelAxes]

_EQUINOX = re.compile(r"weight(_[ih]h.*)?")
_ATTENTION = re.compile(r"att|mha", re.IGNORECASE)


def flax_axes(path: str, leaf: Any) -> KernelAxes:
    """Returns the axes of Flax and Haiku: (*window, in, out).

    Use it as `axes=` of a distribution if all kernels are Flax's, whatever their names.

    A kernel with three axes is Flax's attention: (embed, heads, head_dim) if its layer is named
    `query`, `key` or `value`; (heads, head_dim, embed) if its layer is named `out` and the layer
    around it has `att` or `mha` in its name.

    Args:
      path: The leaf's name.
      leaf: Anything with a `shape`; for a stacked leaf, one slice.
    """
    axes = len(leaf.shape)
    names = ["", "", *path.split("/")]
    if axes == 3 and names[-1] == "kernel":
        if names[-2] in ("query", "key", "value"):
            return KernelAxes((0,), (1, 2))
        if names[-2] == "out" and _ATTENTION.search(names[-3]):
            return KernelAxes((0, 1), (2,))
    return _last(axes)


def equinox_axes(path: str, leaf: Any) -> KernelAxes:
    """Returns the axes of Equinox and PyTorch: (out, in, *window).

    Use it as `axes=` of a distribution if all kernels are Equinox's, whatever their names.

    Args:
      path: The leaf's name; not used.
      leaf: Anything with a `shape`; for a stacked leaf, one slice.
    """
    del path
    return KernelAxes((1,), (0,)) if len(leaf.shape) > 1 else _last(len(leaf.shape))


def default_axes(path: str, leaf: Any) -> KernelAxes:
    """Chooses the axes by the last part of the leaf's name: the default of distributions.

    Leaves named `weight`, `weight_ih` or `weight_hh` have `equinox_axes`; all others, such as
    `kernel` and Haiku's `w`, have `flax_axes`.

    Args:
      path: The leaf's name, such as `Dense_0/kernel`.
      leaf: Anything with a `shape`; for a stacked leaf, one slice.
    """
    rule = equinox_axes if _EQUINOX.fullmatch(path.split("/")[-1]) else flax_axes
    return rule(path, leaf)


def find(axes: Axes, path: str, leaf: Any) -> KernelAxes:
    """Calls `axes(path, leaf)`, checks the result, and makes all axes non-negative.

    Raises:
      TypeError: If the result is not a `KernelAxes`.
      ValueError: If an axis does not exist or is named twice.
    """
    answer, number = axes(path, leaf), len(leaf.shape)
    try:
        inputs, outputs = (tuple(part) for part in answer)
        whole = all(isinstance(a, numbers.Integral) for a in inputs + outputs)
    except (TypeError, ValueError):
        whole = False
    if not whole:
        raise TypeError(
            f"axes: {answer!r} for {path!r}: must be KernelAxes(inputs, outputs), two tuples of "
            "integers, as KernelAxes((1,), (0,))"
        )
    every = inputs + outputs
    if any(not -number <= a < number for a in every) or len({a % number for a in every}) < len(
        every
    ):
        raise ValueError(
            f"axes: {answer} for {path!r} of shape {tuple(leaf.shape)}: each must be one of its "
            f"{number} axes, and a different one"
        )
    return KernelAxes(*(tuple(int(a) % number for a in part) for part in (inputs, outputs)))


def of_leaf(axes: Axes, path: str, leaf: Any, stacked: bool) -> KernelAxes:
    """Returns the axes of a whole leaf, whose first axis counts layers if it is stacked."""
    shape = tuple(leaf.shape)[stacked:]
    layer_axes = find(axes, path, jax.ShapeDtypeStruct(shape, leaf.dtype))
    return KernelAxes(*(tuple(a + stacked for a in part) for part in layer_axes))


def unusual(axes: KernelAxes, number: int) -> KernelAxes | None:
    """Returns `axes`, or None if a leaf with `number` axes is [*window, in, out] already."""
    return None if axes == _last(number) else axes


def or_last(axes: KernelAxes | None, number: int) -> KernelAxes:
    """Returns `axes`, or those of [*window, in, out] for None: the inverse of `unusual`."""
    return _last(number) if axes is None else axes


def size(shape: tuple[int, ...], axes: tuple[int, ...]) -> int:
    """Returns the number of entries along some axes."""
    return math.prod(shape[a] for a in axes)


def kernel_shape(shape: tuple[int, ...], axes: KernelAxes | None) -> tuple[int, ...]:
    """Returns the shape of a layer as [*window, in, out]."""
    if axes is None:
        return shape
    window = (shape[a] for a in _window(len(shape), axes))
    return (*window, size(shape, axes.inputs), size(shape, axes.outputs))


def to_kernel(x: Any, axes: KernelAxes | None) -> Any:
    """Transposes one layer, a JAX or NumPy array, to [*window, in, out]."""
    if axes is None:
        return x
    shape, order = kernel_shape(tuple(x.shape), axes), _order(x.ndim, axes)
    if order != tuple(range(x.ndim)):
        x = x.transpose(order)
    if x.shape == shape:
        return x
    if isinstance(x, jax.Array):
        # A reshape merges axes without moving entries only if all but the first are whole.
        first = x.ndim - len(axes.inputs) - len(axes.outputs)
        second = first + len(axes.inputs)
        for axis in (*range(first + 1, second), *range(second + 1, x.ndim)):
            x = _sharding.gathered(x, axis)
    return x.reshape(shape)


def from_kernel(x: jax.Array, axes: KernelAxes | None, shape: tuple[int, ...]) -> jax.Array:
    """Transposes [*window, in, out] back to a layer of this shape: the inverse of `to_kernel`."""
    if axes is None:
        return x
    order = _order(len(shape), axes)
    ordered = tuple(shape[a] for a in order)
    for axis, several in ((x.ndim - 1, axes.outputs), (x.ndim - 2, axes.inputs)):
        if len(several) > 1:
            # In two steps: the first axis of the group may stay sharded.
            x = _sharding.split(x, axis, size(shape, several[1:]))
            rest = (shape[a] for a in several[1:])
            x = x.reshape(*x.shape[: axis + 1], *rest, *x.shape[axis + 2 :])
    x = x.reshape(ordered)  # drops the axes of length 1 of a layer without inputs or outputs
    if order == tuple(range(len(shape))):
        return x
    return x.transpose(tuple(order.index(a) for a in range(len(shape))))


def _last(number: int) -> KernelAxes:
    """Returns the axes of [*window, in, out]; a vector has outputs only."""
    return KernelAxes(tuple(range(number)[-2:-1]), tuple(range(number)[-1:]))


def _window(number: int, axes: KernelAxes) -> list[int]:
    return [a for a in range(number) if a not in axes.inputs + axes.outputs]


def _order(number: int, axes: KernelAxes) -> tuple[int, ...]:
    return (*_window(number, axes), *axes.inputs, *axes.outputs)
