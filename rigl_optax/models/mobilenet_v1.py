"""Defines MobileNet v1: alternating depthwise and pointwise convolutions."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from rigl_optax.export import Units, Wires
from rigl_optax.models import convolution, layers

STEM = 32
# Output channels and stride of each block.
BLOCKS = (
    (64, 1),
    (128, 2),
    (128, 1),
    (256, 2),
    (256, 1),
    (512, 2),
    *((512, 1),) * 5,
    (1024, 2),
    (1024, 1),
)
glorot = nnx.initializers.glorot_uniform()  # for depthwise kernels, as in the reference code


def dense_layers(distribution: str) -> dict[str, str]:
    """Returns `{pattern of kernels that stay dense: reason}`; MobileNet v2 has the same."""
    del distribution
    return {
        r"^stem/kernel": "the first convolution, dense in the paper's MobileNets",
        r"depthwise/kernel": "depthwise: few weights, and dense in the paper",
    }


class Block(nnx.Module):
    """A 3x3 depthwise convolution and a 1x1 one, each with normalisation and ReLU."""

    def __init__(self, n_in: int, n_out: int, stride: int, *, dtype: Any, rngs: nnx.Rngs) -> None:
        self.depthwise = convolution.conv(
            n_in, n_in, 3, stride, groups=n_in, kernel_init=glorot, dtype=dtype, rngs=rngs
        )
        self.depthwise_norm = convolution.norm(n_in, dtype=dtype, rngs=rngs)
        self.pointwise = convolution.conv(n_in, n_out, 1, dtype=dtype, rngs=rngs)
        self.pointwise_norm = convolution.norm(n_out, dtype=dtype, rngs=rngs)

    def __call__(self, x_BxHxWxC: jax.Array) -> jax.Array:
        """Maps (batch, height, width, n_in) to (batch, height/stride, width/stride, n_out)."""
        x_BxHxWxC = nnx.relu(self.depthwise_norm(self.depthwise(x_BxHxWxC)))
        return nnx.relu(self.pointwise_norm(self.pointwise(x_BxHxWxC)))

    def units(self, walk: Units, x: Wires) -> Wires:
        """Describes itself to `export.compact`."""
        x = walk.norm(walk.depthwise(x, "depthwise"), "depthwise_norm", convolution.EPSILON)
        return walk.relu(convolution.follow(walk, walk.relu(x), "pointwise", "pointwise_norm"))


class MobileNetV1(nnx.Module):
    """MobileNet v1: a 3x3 convolution, 13 separable blocks, a linear layer; no dropout.

    Kernels start truncated-normal of variance 1 / fan_in, depthwise ones Glorot-uniform, as in the
    reference code (`imagenet_resnet/mobilenetv1_model.py`).

    Args:
      image_shape: (height, width) or (height, width, channels) of an image; 224, 224, 3 in the
        paper.
      classes: Number of logits.
      width: Multiplier of all numbers of channels, which are rounded to multiples of 8.
      dtype: Dtype of activations; None: float32.
      rngs: Random keys (stream `params`).

    Examples:
      >>> from flax import nnx
      >>> import jax.numpy as jnp
      >>> def logits(images):
      ...     return MobileNetV1((32, 32, 3), 10, 0.25, rngs=nnx.Rngs(0))(images)
      >>> nnx.eval_shape(logits, jnp.zeros((2, 32, 32, 3))).shape
      (2, 10)
    """

    def __init__(
        self,
        image_shape: Sequence[int],
        classes: int = 1000,
        width: float = 1.0,
        *,
        dtype: Any = None,
        rngs: nnx.Rngs,
    ) -> None:
        n = convolution.make_divisible(STEM * width)
        n_image = convolution.channels(image_shape)
        self.stem = convolution.conv(n_image, n, 3, 2, dtype=dtype, rngs=rngs)
        self.stem_norm = convolution.norm(n, dtype=dtype, rngs=rngs)
        blocks = []
        for i, (base, stride) in enumerate(BLOCKS):
            # The reference code rounds the first block's channels to integers only.
            n_out = convolution.make_divisible(int(width * base), 8 if i else 1)
            blocks.append(Block(n, n_out, stride, dtype=dtype, rngs=rngs))
            n = n_out
        self.blocks = nnx.List(blocks)
        init = convolution.lecun_normal
        self.classifier = layers.Linear(n, classes, kernel_init=init, dtype=dtype, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Returns logits float32 (batch, classes) of images (batch, *image_shape)."""
        x_BxHxWxC = self.stem(convolution.with_channels(images))
        x_BxHxWxC = nnx.relu(self.stem_norm(x_BxHxWxC))
        for block in self.blocks:
            x_BxHxWxC = block(x_BxHxWxC)
        return self.classifier(x_BxHxWxC.mean((1, 2))).astype(jnp.float32)

    def units(self, walk: Units) -> None:
        """Describes itself to `export.compact`."""
        images = walk.inputs(self.stem.kernel.shape[-2])
        x = walk.relu(convolution.follow(walk, images, "stem", "stem_norm"))
        for i, block in enumerate(self.blocks):
            x = block.units(walk.inside("blocks", i), x)
        walk.outputs(walk.layer(x, "classifier"))
