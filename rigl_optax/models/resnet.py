"""Defines residual networks for ImageNet; ResNet-50 is the paper's main network."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from rigl_optax.export import Units, Wires
from rigl_optax.models import convolution, layers

STAGES = (64, 128, 256, 512)  # channels
# For each depth: number of blocks in each stage, and whether they are bottlenecks.
DEPTHS = {
    18: ((2, 2, 2, 2), False),
    34: ((3, 4, 6, 3), False),
    50: ((3, 4, 6, 3), True),
    101: ((3, 4, 23, 3), True),
}
EXPANSION = 4  # output channels of a bottleneck / channels of its 3x3 convolution


def dense_layers(distribution: str) -> dict[str, str]:
    """Returns `{pattern of kernels that stay dense: reason}`: for `uniform` the first convolution.

    With ERK and Erdos-Renyi the paper masks all kernels; at 99 % all but the first convolution.
    """
    if distribution == "uniform":
        return {r"^stem/kernel": "the first convolution, dense with a uniform distribution"}
    return {}


class Block(nnx.Module):
    """A residual branch and a skip; a ReLU is applied to their sum ("v1", post-activation).

    The 3x3 convolution has the stride ("v1.5"). The scale of the branch's last normalisation
    starts at 0. The first block of every stage projects its skip, as in the reference code.
    """

    def __init__(
        self,
        n_in: int,
        n_mid: int,
        stride: int,
        *,
        is_bottleneck: bool,
        projects: bool,
        dtype: Any,
        rngs: nnx.Rngs,
    ) -> None:
        n_out = EXPANSION * n_mid if is_bottleneck else n_mid
        windows = (1, 3, 1) if is_bottleneck else (3, 3)
        strided = windows.index(3)
        convs, norms = [], []
        n = n_in
        for i, window in enumerate(windows):
            is_last = i == len(windows) - 1
            n_next = n_out if is_last else n_mid
            by = stride if i == strided else 1
            convs.append(convolution.conv(n, n_next, window, by, dtype=dtype, rngs=rngs))
            scale = 0.0 if is_last else 1.0
            norms.append(convolution.norm(n_next, scale=scale, dtype=dtype, rngs=rngs))
            n = n_next
        self.convs, self.norms = nnx.List(convs), nnx.List(norms)
        self.has_projection = projects
        if projects:
            self.projection = convolution.conv(n_in, n_out, 1, stride, dtype=dtype, rngs=rngs)
            self.projection_norm = convolution.norm(n_out, dtype=dtype, rngs=rngs)

    def __call__(self, x_BxHxWxC: jax.Array) -> jax.Array:
        """Maps (batch, height, width, n_in) to (batch, height/stride, width/stride, n_out)."""
        skip = branch = x_BxHxWxC
        if self.has_projection:
            skip = self.projection_norm(self.projection(x_BxHxWxC))
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            branch = norm(conv(nnx.relu(branch) if i else branch))
        return nnx.relu(skip + branch)

    def units(self, walk: Units, x: Wires) -> Wires:
        """Describes itself to `export.compact`."""
        skip = branch = x
        if self.has_projection:
            skip = convolution.follow(walk, x, "projection", "projection_norm")
        for i in range(len(self.convs)):
            branch = walk.relu(branch) if i else branch
            branch = convolution.follow(walk, branch, f"convs/{i}", f"norms/{i}")
        return walk.relu(walk.add(skip, branch))


class ResNet(nnx.Module):
    """ResNet-18, 34, 50 or 101: a 7x7 convolution, a pooling, four stages, a linear layer.

    Kernels start truncated-normal of variance 1 / fan_in, the classifier's normal of standard
    deviation 0.01, its bias at zero, as in the reference code (`imagenet_resnet/resnet_model.py`).

    Args:
      image_shape: (height, width) or (height, width, channels) of an image; 224, 224, 3 in the
        paper.
      classes: Number of logits.
      width: Multiplier of all numbers of channels, which are rounded down.
      depth: 18, 34, 50 or 101.
      dtype: Dtype of activations; None: float32.
      rngs: Random keys (stream `params`).

    Raises:
      ValueError: If there is no such depth.

    Examples:
      >>> from flax import nnx
      >>> import jax.numpy as jnp
      >>> model = ResNet((64, 64, 3), 10, 0.25, depth=18, rngs=nnx.Rngs(0))
      >>> model(jnp.zeros((2, 64, 64, 3))).shape
      (2, 10)
    """

    def __init__(
        self,
        image_shape: Sequence[int],
        classes: int = 1000,
        width: float = 1.0,
        *,
        depth: int = 50,
        dtype: Any = None,
        rngs: nnx.Rngs,
    ) -> None:
        if depth not in DEPTHS:
            raise ValueError(f"depth={depth}: must be one of {', '.join(map(str, DEPTHS))}")
        counts, is_bottleneck = DEPTHS[depth]
        n = convolution.scaled(width, STAGES[0])
        n_image = convolution.channels(image_shape)
        self.stem = convolution.conv(n_image, n, 7, 2, dtype=dtype, rngs=rngs)
        self.stem_norm = convolution.norm(n, dtype=dtype, rngs=rngs)
        stages = []
        for stage, (base, count) in enumerate(zip(STAGES, counts, strict=True)):
            n_mid = convolution.scaled(width, base)
            blocks = []
            for i in range(count):
                stride = 2 if stage and not i else 1
                block = Block(
                    n,
                    n_mid,
                    stride,
                    is_bottleneck=is_bottleneck,
                    projects=not i,
                    dtype=dtype,
                    rngs=rngs,
                )
                blocks.append(block)
                n = EXPANSION * n_mid if is_bottleneck else n_mid
            stages.append(nnx.List(blocks))
        self.stages = nnx.List(stages)
        init = nnx.initializers.normal(0.01)
        self.classifier = layers.Linear(n, classes, kernel_init=init, dtype=dtype, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Returns logits float32 (batch, classes) of images (batch, *image_shape)."""
        x_BxHxWxC = self.stem(convolution.with_channels(images))
        x_BxHxWxC = nnx.relu(self.stem_norm(x_BxHxWxC))
        x_BxHxWxC = nnx.max_pool(x_BxHxWxC, (3, 3), (2, 2), "SAME")
        for stage in self.stages:
            for block in stage:
                x_BxHxWxC = block(x_BxHxWxC)
        return self.classifier(x_BxHxWxC.mean((1, 2))).astype(jnp.float32)

    def units(self, walk: Units) -> None:
        """Describes itself to `export.compact`."""
        images = walk.inputs(self.stem.kernel.shape[-2])
        x = walk.relu(convolution.follow(walk, images, "stem", "stem_norm"))
        for i, stage in enumerate(self.stages):
            for j, block in enumerate(stage):
                x = block.units(walk.inside("stages", i, j), x)
        walk.outputs(walk.layer(x, "classifier"))
