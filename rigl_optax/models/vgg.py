"""Defines VGG without normalisation, as in the reference code."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from rigl_optax.export import Units
from rigl_optax.models import convolution, layers

CHANNELS = (64, 128, 256, 512, 512)  # of each group
# For each depth: number of convolutions in each group. The original has hidden linear layers, too.
DEPTHS = {11: (1, 1, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}
_he = nnx.initializers.he_normal()


def dense_layers(distribution: str) -> dict[str, str]:
    """Returns `{pattern of kernels that stay dense: reason}`: with `uniform` the first one."""
    if distribution == "uniform":
        return {r"^convs/0/kernel": "the first convolution, dense with a uniform distribution"}
    return {}


class VGG(nnx.Module):
    """VGG-11, 16 or 19: 3x3 convolutions, poolings, a mean over the image, one linear layer.

    As in the reference code (`imagenet_resnet/vgg.py`) there are no hidden linear layers, no biases
    and no pooling after the last group; kernels start truncated-normal of variance 2 / fan_in.

    Args:
      image_shape: (height, width) or (height, width, channels) of an image; at least 16 pixels a
        side.
      classes: Number of logits.
      width: Multiplier of all numbers of channels, which are rounded down.
      depth: 11, 16 or 19.
      dtype: Dtype of activations; None: float32.
      rngs: Random keys (stream `params`).

    Raises:
      ValueError: If there is no such depth, or an image has fewer than 16 pixels a side.

    Examples:
      >>> from flax import nnx
      >>> import jax.numpy as jnp
      >>> model = VGG((32, 32, 3), 10, 0.25, depth=11, rngs=nnx.Rngs(0))
      >>> model(jnp.zeros((2, 32, 32, 3))).shape
      (2, 10)
    """

    def __init__(
        self,
        image_shape: Sequence[int],
        classes: int = 1000,
        width: float = 1.0,
        *,
        depth: int = 16,
        dtype: Any = None,
        rngs: nnx.Rngs,
    ) -> None:
        if depth not in DEPTHS:
            raise ValueError(f"depth={depth}: must be one of {', '.join(map(str, DEPTHS))}")
        n = convolution.channels(image_shape)
        if min(image_shape[:2]) < 2 ** (len(CHANNELS) - 1):
            raise ValueError(
                f"image_shape={tuple(image_shape)}: must have 16 pixels a side or more"
            )
        self.groups = DEPTHS[depth]
        convs = []
        for base, count in zip(CHANNELS, self.groups, strict=True):
            for _ in range(count):
                n_out = convolution.scaled(width, base)
                conv = convolution.conv(n, n_out, 3, kernel_init=_he, dtype=dtype, rngs=rngs)
                convs.append(conv)
                n = n_out
        self.convs = nnx.List(convs)
        self.classifier = layers.Linear(
            n, classes, use_bias=False, kernel_init=_he, dtype=dtype, rngs=rngs
        )

    def __call__(self, images: jax.Array) -> jax.Array:
        """Returns logits float32 (batch, classes) of images (batch, *image_shape)."""
        x_BxHxWxC = convolution.with_channels(images)
        convs = iter(self.convs)
        for group, count in enumerate(self.groups):
            if group:
                x_BxHxWxC = nnx.max_pool(x_BxHxWxC, (2, 2), (2, 2))
            for _ in range(count):
                x_BxHxWxC = nnx.relu(next(convs)(x_BxHxWxC))
        return self.classifier(x_BxHxWxC.mean((1, 2))).astype(jnp.float32)

    def units(self, walk: Units) -> None:
        """Describes itself to `export.compact`."""
        x = walk.inputs(self.convs[0].kernel.shape[-2])
        for i in range(len(self.convs)):
            x = walk.relu(walk.layer(x, f"convs/{i}"))
        walk.outputs(walk.layer(x, "classifier"))
