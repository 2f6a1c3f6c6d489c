"""Masks at one bit an entry: an eighth of the memory, for what is seldom looked at.

A byte holds neighbours along the axis before the last, so that a loop over the last axis, which is
contiguous, reads whole vectors of bytes and shifts them all alike.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def shape_of(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the bytes for a mask of this shape."""
    before, length, after = _split(shape)
    return (*before, -(-length // 8), *after)


def pack(mask: jax.Array) -> jax.Array:
    """The entries of a bool array as bits.

    Args:
      mask: Bool, any shape.

    Returns:
      uint8 array of shape `shape_of(mask.shape)`.

    Example:
      >>> pack(jnp.array([True, False, True])).tolist()
      [5]
    """
    before, length, after = _split(mask.shape)
    axis, count = len(before), -(-length // 8)
    bits = mask.reshape(*before, length, *after).astype(jnp.uint8)
    padding = [(0, 8 * count - length if i == axis else 0, 0) for i in range(bits.ndim)]
    bits = lax.pad(bits, jnp.uint8(0), padding).reshape(*before, count, 8, *after)
    shifted = bits << _places(bits.ndim, axis + 1)
    return lax.reduce(shifted, np.uint8(0), lax.bitwise_or, (axis + 1,))


def unpack(packed: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The inverse of `pack`: a bool array of this shape."""
    before, length, after = _split(shape)
    axis, count = len(before), packed.shape[len(before)]
    apart = packed.reshape(*before, count, 1, *after) >> _places(packed.ndim + 1, axis + 1)
    bits = (apart & jnp.uint8(1)).reshape(*before, 8 * count, *after)
    return lax.slice_in_dim(bits, 0, length, axis=axis).reshape(shape).astype(bool)


def _split(shape: tuple[int, ...]) -> tuple[tuple[int, ...], int, tuple[int, ...]]:
    """A shape in three: before the axis that is packed, that axis, after it."""
    shape = shape or (1,)
    axis = max(len(shape) - 2, 0)
    return tuple(shape[:axis]), shape[axis], tuple(shape[axis + 1 :])


def _places(ndim: int, axis: int) -> np.ndarray:
    """uint8 0 to 7 along one axis, of length 1 along all others."""
    return np.arange(8, dtype=np.uint8).reshape([8 if i == axis else 1 for i in range(ndim)])
