"""Builds the convolutions and normalisations that all convolutional networks here share."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from rigl_optax.export import Units, Wires
from rigl_optax.models import layers

# Batch normalisation of all networks of the reference code.
MOMENTUM, EPSILON = 0.9, 1e-5

# The reference code's default: truncated normal of variance 1 / fan_in (He's would be 2 / fan_in).
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
    """Builds a square convolution without bias.

    Args:
      n_in: Number of input channels.
      n_out: Number of output channels.
      window: Height and width of the window.
      stride: Stride in both directions.
      rngs: Random keys (stream `params`).
      groups: Number of channel groups; `n_in` for a depthwise convolution.
      padding: As in `nnx.Conv`. None: half the window on each side, whatever the size of the image
        and the stride ("fixed padding" in the reference code).
      kernel_init: Initializer of the kernel.
      dtype: Dtype of inputs and products; None: float32. The kernel is float32.
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
    """Builds a batch normalisation whose scale starts at `scale`; its statistics are float32."""
    return nnx.BatchNorm(
        channels,
        momentum=MOMENTUM,
        epsilon=EPSILON,
        scale_init=nnx.initializers.constant(scale),
        dtype=dtype,
        rngs=rngs,
    )


def follow(walk: Units, x: Wires, path: str, norm_path: str) -> Wires:
    """Follows a convolution and the normalisation of its result, for `export.compact`."""
    return walk.norm(walk.layer(x, path, norm=norm_path), norm_path, EPSILON)


def channels(image_shape: Sequence[int]) -> int:
    """Returns the number of channels of images (height, width[, channels]).

    Raises:
      ValueError: If the shape has another number of dimensions.
    """
    if len(image_shape) not in (2, 3):
        raise ValueError(
            f"image_shape={tuple(image_shape)}: must be (height, width), or that and channels"
        )
    return image_shape[2] if len(image_shape) == 3 else 1


def with_channels(images: jax.Array) -> jax.Array:
    """Returns images (batch, height, width, channels); adds the last axis if it is missing."""
    return images if images.ndim == 4 else jnp.expand_dims(images, -1)


def scaled(width: float, units: int) -> int:
    """Returns `width * units` channels, rounded down as in the reference code; at least 1."""
    return max(1, int(width * units))


def make_divisible(value: float, divisor: int = 8) -> int:
    """Rounds to the nearest multiple of `divisor`, but not below 90 % of `value` or `divisor`.

    Examples:
      >>> [make_divisible(v) for v in (32, 15.04, 11.2, 3)]
      [32, 16, 16, 8]
    """
    rounded = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * value else rounded
