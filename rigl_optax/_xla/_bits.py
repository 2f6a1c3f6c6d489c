"""Packs masks into one bit for each weight.

A rewiring overwrites the old masks with the new ones. Reading the old ones afterwards would make
XLA copy all masks at every step: 25.5 MB and 6,229 page faults on ResNet-50's shapes. So the
rewiring returns one packed bit for each weight, changed or not, and the old masks are rebuilt from
it (`_wrapper/_rewiring.py`). `tests/core/test_mask_memory.py` shows that an ordinary step copies no
mask.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def shape_of(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the shape of the bytes that `pack` makes of a mask of this shape."""
    before, length, after = _split(shape)
    return (*before, -(-length // 8), *after)


def pack(mask: jax.Array) -> jax.Array:
    """Packs the entries of a bool array into bits.

    Args:
      mask: Bool array of any shape.

    Returns:
      uint8 array of shape `shape_of(mask.shape)`.

    Examples:
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
    """Unpacks the bytes of `pack` into a bool array of this shape."""
    before, length, after = _split(shape)
    axis, count = len(before), packed.shape[len(before)]
    apart = packed.reshape(*before, count, 1, *after) >> _places(packed.ndim + 1, axis + 1)
    bits = (apart & jnp.uint8(1)).reshape(*before, 8 * count, *after)
    return lax.slice_in_dim(bits, 0, length, axis=axis).reshape(shape).astype(bool)


def _split(shape: tuple[int, ...]) -> tuple[tuple[int, ...], int, tuple[int, ...]]:
    """Splits a shape at the axis that is packed: before it, its length, after it."""
    shape = shape or (1,)
    # The axis before the last. A loop over the last one, which is contiguous in memory, then reads
    # whole vectors of bytes and shifts all of them alike.
    axis = max(len(shape) - 2, 0)
    return tuple(shape[:axis]), shape[axis], tuple(shape[axis + 1 :])


def _places(ndim: int, axis: int) -> np.ndarray:
    """Returns uint8 0 to 7 along one axis, of length 1 along all others."""
    return np.arange(8, dtype=np.uint8).reshape([8 if i == axis else 1 for i in range(ndim)])
