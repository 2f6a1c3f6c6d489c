"""Defines MobileNet v2: inverted residuals with linear bottlenecks."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from rigl_optax.export import Units, Wires
from rigl_optax.models import convolution, layers
from rigl_optax.models.mobilenet_v1 import dense_layers as dense_layers
from rigl_optax.models.mobilenet_v1 import glorot

STEM, HEAD = 32, 1280
EXPANSION = 6  # channels inside a block / channels of its input; 1 in the first block
# Output channels and stride of each block.
BLOCKS = (
    (16, 1),
    (24, 2),
    (24, 1),
    (32, 2),
    *((32, 1),) * 2,
    (64, 2),
    *((64, 1),) * 3,
    *((96, 1),) * 3,
    (160, 2),
    *((160, 1),) * 2,
    (320, 1),
)


class Block(nnx.Module):
    """Expands, convolves depthwise and projects linearly; adds the input where shapes agree."""

    def __init__(
        self, n_in: int, n_out: int, stride: int, expansion: int, *, dtype: Any, rngs: nnx.Rngs
    ) -> None:
        n_mid = expansion * n_in
        self.has_expansion = expansion != 1
        if self.has_expansion:
            self.expand = convolution.conv(n_in, n_mid, 1, dtype=dtype, rngs=rngs)
            self.expand_norm = convolution.norm(n_mid, dtype=dtype, rngs=rngs)
        self.depthwise = convolution.conv(
            n_mid, n_mid, 3, stride, groups=n_mid, kernel_init=glorot, dtype=dtype, rngs=rngs
        )
        self.depthwise_norm = convolution.norm(n_mid, dtype=dtype, rngs=rngs)
        self.project = convolution.conv(n_mid, n_out, 1, dtype=dtype, rngs=rngs)
        self.project_norm = convolution.norm(n_out, dtype=dtype, rngs=rngs)
        self.has_skip = stride == 1 and n_in == n_out

    def __call__(self, x_BxHxWxC: jax.Array) -> jax.Array:
        """Maps (batch, height, width, n_in) to (batch, height/stride, width/stride, n_out)."""
        hidden = x_BxHxWxC
        if self.has_expansion:
            hidden = nnx.relu(self.expand_norm(self.expand(hidden)))
        hidden = nnx.relu(self.depthwise_norm(self.depthwise(hidden)))
        out = self.project_norm(self.project(hidden))
        return x_BxHxWxC + out if self.has_skip else out

    def units(self, walk: Units, x: Wires) -> Wires:
        """Describes itself to `export.compact`."""
        hidden = x
        if self.has_expansion:
            hidden = walk.relu(convolution.follow(walk, hidden, "expand", "expand_norm"))
        hidden = walk.depthwise(hidden, "depthwise")
        hidden = walk.relu(walk.norm(hidden, "depthwise_norm", convolution.EPSILON))
        out = convolution.follow(walk, hidden, "project", "project_norm")
        return walk.add(x, out) if self.has_skip else out


class MobileNetV2(nnx.Module):
    """MobileNet v2: a 3x3 convolution, 17 inverted residuals, a 1x1 convolution, a linear layer.

    Activations are ReLU (not ReLU6), and kernels start as those of `MobileNetV1`, both as in the
    reference code (`imagenet_resnet/mobilenetv2_model.py`).

    Args:
      image_shape: (height, width) or (height, width, channels) of an image; 224, 224, 3 in the
        paper.
      classes: Number of logits.
      width: Multiplier of all numbers of channels, which are rounded to multiples of 8; the last
        convolution always has at least 1280.
      dtype: Dtype of activations; None: float32.
      rngs: Random keys (stream `params`).

    Examples:
      >>> from flax import nnx
      >>> import jax.numpy as jnp
      >>> def logits(images):
      ...     return MobileNetV2((32, 32, 3), 10, 0.25, rngs=nnx.Rngs(0))(images)
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
            n_out = convolution.make_divisible(int(width * base), 8 if i else 1)
            blocks.append(Block(n, n_out, stride, EXPANSION if i else 1, dtype=dtype, rngs=rngs))
            n = n_out
        self.blocks = nnx.List(blocks)
        n_head = max(HEAD, convolution.make_divisible(HEAD * width))
        self.head = convolution.conv(n, n_head, 1, dtype=dtype, rngs=rngs)
        self.head_norm = convolution.norm(n_head, dtype=dtype, rngs=rngs)
        init = convolution.lecun_normal
        self.classifier = layers.Linear(n_head, classes, kernel_init=init, dtype=dtype, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Returns logits float32 (batch, classes) of images (batch, *image_shape)."""
        x_BxHxWxC = self.stem(convolution.with_channels(images))
        x_BxHxWxC = nnx.relu(self.stem_norm(x_BxHxWxC))
        for block in self.blocks:
            x_BxHxWxC = block(x_BxHxWxC)
        x_BxHxWxC = nnx.relu(self.head_norm(self.head(x_BxHxWxC)))
        return self.classifier(x_BxHxWxC.mean((1, 2))).astype(jnp.float32)

    def units(self, walk: Units) -> None:
        """Describes itself to `export.compact`."""
        images = walk.inputs(self.stem.kernel.shape[-2])
        x = walk.relu(convolution.follow(walk, images, "stem", "stem_norm"))
        for i, block in enumerate(self.blocks):
            x = block.units(walk.inside("blocks", i), x)
        x = walk.relu(convolution.follow(walk, x, "head", "head_norm"))
        walk.outputs(walk.layer(x, "classifier"))
