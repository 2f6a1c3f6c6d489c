"""Computes depthwise convolutions fast on the CPU, where XLA's own are slow."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from rigl_optax.condensed import _devices

_Pads = tuple[tuple[int, int], ...]


def depthwise(
    x: jax.Array,
    kernel: jax.Array,
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
) -> jax.Array:
    """Convolves each channel with a window of its own.

    On the CPU this is a sum of shifted and weighted images, one for each element of the window:
    XLA's grouped convolution takes many times as long there, most of all its gradient
    (`benchmarks/depthwise.py`). On other devices it is XLA's grouped convolution.

    Args:
      x: [batch, height, width, channels].
      kernel: [height, width, 1, channels].
      strides: Strides along height and width.
      padding: Padding before and after, along height and width.

    Returns:
      [batch, height, width, channels].

    Examples:
      >>> import jax.numpy as jnp
      >>> images, kernel = jnp.ones((2, 6, 6, 8)), jnp.ones((3, 3, 1, 8))
      >>> y = depthwise(images, kernel, (1, 1), ((1, 1), (1, 1)))
      >>> y.shape, float(y[0, 0, 0, 0]), float(y[0, 1, 1, 0])
      ((2, 6, 6, 8), 4.0, 9.0)
    """

    def grouped(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return lax.conv_general_dilated(
            x,
            kernel,
            strides,
            padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=x.shape[-1],
        )

    geometry = (tuple(strides), tuple((int(low), int(high)) for low, high in padding))
    return lax.platform_dependent(
        x, kernel, cpu=functools.partial(_shifted, *geometry), default=grouped
    )


def _sum_of_taps(
    strides: tuple[int, ...], padding: _Pads, x: jax.Array, kernel: jax.Array
) -> jax.Array:
    """Sums the images, shifted and weighted for each element (tap) of the window."""
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    (height, width), (down, right) = kernel.shape[:2], strides
    rows = (x.shape[1] - height) // down + 1
    columns = (x.shape[2] - width) // right + 1
    y = jnp.zeros((), x.dtype)
    for i in range(height):
        for j in range(width):
            ends = (i + (rows - 1) * down + 1, j + (columns - 1) * right + 1)
            seen = lax.slice(x, (0, i, j, 0), (x.shape[0], *ends, x.shape[3]), (1, down, right, 1))
            y = y + seen * kernel[i, j, 0]
    return y


_shifted = jax.custom_vjp(_sum_of_taps, nondiff_argnums=(0, 1))


def _forward(
    strides: tuple[int, ...], padding: _Pads, x: jax.Array, kernel: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _sum_of_taps(strides, padding, x, kernel), (x, kernel)


def _backward(
    strides: tuple[int, ...], padding: _Pads, saved: tuple[jax.Array, jax.Array], dy: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    of_images = functools.partial(_sum_of_taps, strides, padding, kernel=kernel)
    (dx,) = jax.linear_transpose(of_images, x)(dy)
    return dx, _devices.summed(_kernel_gradient(strides, padding, x, dy, kernel), kernel)


_shifted.defvjp(_forward, _backward)


def _kernel_gradient(
    strides: tuple[int, ...], padding: _Pads, x: jax.Array, dy: jax.Array, kernel: jax.Array
) -> jax.Array:
    """Sums, for each tap, its shifted images times the output's gradient, over all but channels.

    Adds up rows of outputs elementwise, and sums over batch and width only once at the end: a full
    reduction for each tap takes several times as long on the CPU.
    """
    (height, width), (down, right) = kernel.shape[:2], strides
    batch, rows, columns, channels = dy.shape
    dtype = jnp.promote_types(dy.dtype, jnp.float32)
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))

    def add_row(totals: list[jax.Array], row: jax.Array) -> tuple[list[jax.Array], None]:
        dy_BxWxC = lax.dynamic_index_in_dim(dy, row, 1, keepdims=False).astype(dtype)
        seen = lax.dynamic_slice_in_dim(x, row * down, height, 1)
        added = []
        for tap, total in enumerate(totals):
            i, j = divmod(tap, width)
            end = j + (columns - 1) * right + 1
            part = lax.slice(
                seen, (0, i, j, 0), (batch, i + 1, end, channels), (1, 1, right, 1)
            ).reshape(dy_BxWxC.shape)
            added.append(total + part * dy_BxWxC)
        return added, None

    nothing = _devices.zeros((batch, columns, channels), dtype, x, dy)
    totals, _ = lax.scan(add_row, [nothing] * (height * width), jnp.arange(rows))
    gradient = jnp.stack([total.sum((0, 1)) for total in totals])
    return gradient.reshape(kernel.shape).astype(kernel.dtype)
