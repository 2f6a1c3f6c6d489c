"""Defines wide residual networks for small images; WRN-22-2 is the paper's CIFAR-10 network."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from rigl_optax.export import Units, Wires
from rigl_optax.models import convolution, dropout, layers

GROUPS = (16, 32, 64)  # channels of each group, to be multiplied by k
STEM = 16  # channels of the first convolution
_glorot = nnx.initializers.glorot_uniform()


def dense_layers(distribution: str) -> dict[str, str]:
    """Returns `{pattern of kernels that stay dense: reason}`: always the first convolution."""
    del distribution
    return {r"^stem/kernel": "the first convolution, which the reference never masks"}


class Block(nnx.Module):
    """Two 3x3 convolutions, each after normalisation and ReLU, added to a skip.

    Where the number of channels changes, the skip is a 1x1 convolution of the normalised input.
    Strided convolutions are padded like TensorFlow's `SAME`, as in the reference code.
    """

    def __init__(
        self, n_in: int, n_out: int, stride: int, *, drop: float, dtype: Any, rngs: nnx.Rngs
    ) -> None:
        self.norm1 = convolution.norm(n_in, dtype=dtype, rngs=rngs)
        self.conv1 = _conv(n_in, n_out, 3, stride, dtype, rngs)
        self.norm2 = convolution.norm(n_out, dtype=dtype, rngs=rngs)
        self.dropout = dropout.Dropout(drop, rngs=rngs) if drop else None
        self.conv2 = _conv(n_out, n_out, 3, 1, dtype, rngs)
        self.skip = _conv(n_in, n_out, 1, stride, dtype, rngs) if n_in != n_out else None

    def __call__(self, x_BxHxWxC: jax.Array) -> jax.Array:
        """Maps (batch, height, width, n_in) to (batch, height/stride, width/stride, n_out)."""
        active = nnx.relu(self.norm1(x_BxHxWxC))
        skip = x_BxHxWxC if self.skip is None else self.skip(active)
        hidden = nnx.relu(self.norm2(self.conv1(active)))
        if self.dropout is not None:
            hidden = self.dropout(hidden)
        return skip + self.conv2(hidden)

    def units(self, walk: Units, x: Wires) -> Wires:
        """Describes itself to `export.compact`."""
        active = walk.relu(walk.norm(x, "norm1", convolution.EPSILON))
        skip = x if self.skip is None else walk.layer(active, "skip")
        hidden = walk.relu(convolution.follow(walk, active, "conv1", "norm2"))
        return walk.add(skip, walk.layer(hidden, "conv2"))


class WideResNet(nnx.Module):
    """WRN-d-k: a 3x3 convolution, three groups of pre-activation blocks, and a linear layer.

    Kernels start Glorot-uniform, scales at 1 and the classifier's bias at zero, as in the reference
    code (`cifar_resnet/resnet_model.py`). That code also has a dropout of 0.3 inside each block,
    which the paper does not mention.

    Args:
      image_shape: (height, width) or (height, width, channels) of an image.
      classes: Number of logits.
      width: Multiplier of all numbers of channels, including the first convolution's.
      depth: The d of WRN-d-k, 4 more than a multiple of 6.
      k: Further multiplier of the channels of the groups, 16, 32 and 64.
      dropout: Fraction dropped between the two convolutions of each block.
      dtype: Dtype of activations; None: float32.
      rngs: Random keys (streams `params` and `dropout`).

    Raises:
      ValueError: If there is no such depth, or k is below 1.

    Examples:
      >>> from flax import nnx
      >>> import jax.numpy as jnp
      >>> model = WideResNet((32, 32, 3), 10, depth=10, k=1, rngs=nnx.Rngs(0))
      >>> model(jnp.zeros((2, 32, 32, 3))).shape
      (2, 10)
    """

    def __init__(
        self,
        image_shape: Sequence[int],
        classes: int = 10,
        width: float = 1.0,
        *,
        depth: int = 22,
        k: int = 2,
        dropout: float = 0.0,
        dtype: Any = None,
        rngs: nnx.Rngs,
    ) -> None:
        if depth < 10 or (depth - 4) % 6:
            raise ValueError(f"depth={depth}: must be 4 more than a multiple of 6, as 10, 16, 22")
        if k < 1:
            raise ValueError(f"k={k}: must be at least 1")
        n = convolution.scaled(width, STEM)
        self.stem = _conv(convolution.channels(image_shape), n, 3, 1, dtype, rngs)
        blocks = []
        for group, base in enumerate(GROUPS):
            n_out = convolution.scaled(width, base * k)
            for i in range((depth - 4) // 6):
                stride = 2 if group and not i else 1
                blocks.append(Block(n, n_out, stride, drop=dropout, dtype=dtype, rngs=rngs))
                n = n_out
        self.blocks = nnx.List(blocks)
        self.norm = convolution.norm(n, dtype=dtype, rngs=rngs)
        self.classifier = layers.Linear(n, classes, kernel_init=_glorot, dtype=dtype, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Returns logits float32 (batch, classes) of images (batch, *image_shape)."""
        x_BxHxWxC = self.stem(convolution.with_channels(images))
        for block in self.blocks:
            x_BxHxWxC = block(x_BxHxWxC)
        pooled_BxC = nnx.relu(self.norm(x_BxHxWxC)).mean((1, 2))
        return self.classifier(pooled_BxC).astype(jnp.float32)

    def units(self, walk: Units) -> None:
        """Describes itself to `export.compact`."""
        x = walk.layer(walk.inputs(self.stem.kernel.shape[-2]), "stem")
        for i, block in enumerate(self.blocks):
            x = block.units(walk.inside("blocks", i), x)
        x = walk.relu(walk.norm(x, "norm", convolution.EPSILON))
        walk.outputs(walk.layer(x, "classifier"))


def _conv(
    n_in: int, n_out: int, window: int, stride: int, dtype: Any, rngs: nnx.Rngs
) -> layers.Conv:
    return convolution.conv(
        n_in, n_out, window, stride, padding="SAME", kernel_init=_glorot, dtype=dtype, rngs=rngs
    )
