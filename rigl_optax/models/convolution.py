"""What the convolutional networks have in common: convolutions, normalisation, image layout."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from rigl_optax.models import layers

# Of batch statistics, in all networks of the reference code.
MOMENTUM, EPSILON = 0.9, 1e-5

# Its default: truncated normal of variance 1 / fan_in, not He's.
lecun_normal = nnx.initializers.lecun_normal()


def conv(
    n_in: int,
    n_out: int,
    window: int,
    stride: int = 1,
    *,
    rngs: nnx.Rngs,
    groups: int = 1,
    padding: str | None = None,
    kernel_init: Any = lecun_normal,
    dtype: Any = None,
) -> layers.Conv:
    """A square convolution without bias.

    Args:
      n_in: Input channels.
      n_out: Output channels.
      window: Side of the window.
      stride: In both directions.
      rngs: Random keys (stream `params`).
      groups: Of channels; `n_in` for a depthwise one.
      padding: As of `nnx.Conv`; if not given, by the window alone: half of it on each side, so that
        strided outputs do not move with the size of the image ("fixed padding").
      kernel_init: Initializer of the kernel.
      dtype: Of inputs and products; float32 if not given. The kernel is float32.
    """
    sides = ((window - 1) // 2, window - 1 - (window - 1) // 2)
    return layers.Conv(
        n_in,
        n_out,
        (window, window),
        strides=(stride, stride),
        padding=[sides, sides] if padding is None else padding,
        feature_group_count=groups,
        use_bias=False,
        kernel_init=kernel_init,
        dtype=dtype,
        rngs=rngs,
    )


def norm(channels: int, *, rngs: nnx.Rngs, scale: float = 1.0, dtype: Any = None) -> nnx.BatchNorm:
    """Batch normalisation whose scale starts at `scale`; statistics are float32."""
    return nnx.BatchNorm(
        channels,
        momentum=MOMENTUM,
        epsilon=EPSILON,
        scale_init=nnx.initializers.constant(scale),
        dtype=dtype,
        rngs=rngs,
    )


def channels(image_shape: Sequence[int]) -> int:
    """Channels of images (height, width) or (height, width, channels).

    Raises:
      ValueError: If they have another shape.
    """
    if len(image_shape) not in (2, 3):
        raise ValueError(
            f"image_shape={tuple(image_shape)}: must be (height, width), or that and channels"
        )
    return image_shape[2] if len(image_shape) == 3 else 1


def with_channels(images: jax.Array) -> jax.Array:
    """Images (batch, height, width, channels), the last axis added if there is none."""
    return images if images.ndim == 4 else jnp.expand_dims(images, -1)


def scaled(width: float, units: int) -> int:
    """So many channels times a width multiplier, rounded down as in the reference; at least 1."""
    return max(1, int(width * units))


def make_divisible(value: float, divisor: int = 8) -> int:
    """The nearest multiple of `divisor`, but at least 90 % of `value` and one `divisor`.

    Example:
      >>> [make_divisible(v) for v in (32, 15.04, 11.2, 3)]
      [32, 16, 16, 8]
    """
    rounded = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * value else rounded
