"""Depthwise convolutions, which XLA is slow at on the CPU."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax


def depthwise(
    x: jax.Array,
    kernel: jax.Array,
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
) -> jax.Array:
    """Convolution of each channel by itself.

    On the CPU a sum over the taps of shifted images: XLA's grouped convolution takes many times
    as long there, backward most of all (`benchmarks/depthwise.py`). Elsewhere it is that one.

    Args:
      x: [batch, height, width, channels].
      kernel: [height, width, 1, channels].
      strides: Of the window.
      padding: What is added at both ends of height and width.

    Returns:
      [batch, height, width, channels].

    Example:
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

    def shifted(x: jax.Array, kernel: jax.Array) -> jax.Array:
        x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
        (height, width), (down, right) = kernel.shape[:2], strides
        rows = (x.shape[1] - height) // down + 1
        columns = (x.shape[2] - width) // right + 1
        y = jnp.zeros((), x.dtype)
        for i in range(height):
            for j in range(width):
                ends = (i + (rows - 1) * down + 1, j + (columns - 1) * right + 1)
                seen = lax.slice(
                    x, (0, i, j, 0), (x.shape[0], *ends, x.shape[3]), (1, down, right, 1)
                )
                y = y + seen * kernel[i, j, 0]
        return y

    return lax.platform_dependent(x, kernel, cpu=shifted, default=grouped)
