"""Reproduces the paper's published FLOPs and model sizes to the digit.

This library counts otherwise (`count_flops`). The reference code passes Keras layers to the
counting functions of the MicroNet challenge; the published numbers depend on their quirks:

- Every layer has a bias and a ReLU, even convolutions before a normalisation and the classifier:
  `(2 v + 1) n` FLOPs, with v inputs per output (at the real-valued density) and n outputs.
- Outputs are `ceil((size - kernel + 1 + 2 (kernel // 2)) / stride)` wide, where `size` is that of
  the layer's input: the padded one where the model pads before the layer.
- A depthwise kernel counts as a convolution with one output channel: the same multiplies, one
  bias instead of one per channel.

Source: `sparse_utils.get_stats` in the reference code; paper, appendix H.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple


class Layer(NamedTuple):
    """A layer as the counting functions see it.

    Attributes:
      name: Name of the layer.
      shape: Shape of the kernel: (height, width, in, out) or (in, out). Depthwise: (h, w,
        channels, 1) as in Keras to reproduce the quirk, or (h, w, 1, channels) to count correctly.
      size: Height and width of its input, in pixels, after any explicit padding.
      stride: Stride of a convolution.
    """

    name: str
    shape: tuple[int, ...]
    size: int = 1
    stride: int = 1

    @property
    def weights(self) -> int:
        """Number of weights, biases not counted."""
        return math.prod(self.shape)

    @property
    def outputs(self) -> int:
        """Number of outputs: one for each window and output channel."""
        if len(self.shape) == 2:
            return self.shape[1]
        kernel = self.shape[0]
        width = math.ceil((self.size - kernel + 1 + 2 * (kernel // 2)) / self.stride)
        return width**2 * self.shape[3]


def published_flops(layers: Sequence[Layer], sparsity: Mapping[str, float] | None = None) -> float:
    """Counts FLOPs of a forward pass as the paper does.

    Args:
      layers: From `resnet50()`, `mobilenet_v1()`, ....
      sparsity: `{name: sparsity}`; layers that are not in it are dense.

    Returns:
      Multiplies plus adds, real-valued.

    Raises:
      ValueError: If `sparsity` names a layer that does not exist.
    """
    densities = _densities(layers, sparsity)
    return sum((2 * densities[x.name] * x.weights / x.shape[-1] + 1) * x.outputs for x in layers)


def published_megabytes(
    layers: Sequence[Layer], sparsity: Mapping[str, float] | None = None
) -> float:
    """Computes the model size as the paper does, in units of 10^6 bytes.

    Active weights and one bias per output channel take 4 bytes each; a layer that is not dense
    takes one more bit per weight, its mask.

    Args:
      layers: As in `published_flops`.
      sparsity: As in `published_flops`.

    Returns:
      Size in 10^6 bytes, real-valued.

    Raises:
      ValueError: If `sparsity` names a layer that does not exist.

    Example:
      >>> round(published_megabytes(resnet50()), 3)
      102.122
    """
    densities = _densities(layers, sparsity)
    bits = sum(
        32 * (densities[x.name] * x.weights + x.shape[-1])
        + (x.weights if densities[x.name] < 1 else 0)
        for x in layers
    )
    return bits / 8e6


def resnet50(width: float = 1.0) -> list[Layer]:
    """Lists the layers of ResNet-50 on 224x224 pixels, stride in the 3x3, in forward order."""
    stem = int(64 * width)
    layers = [Layer("conv1", (7, 7, 3, stem), 230, 2)]
    channels, size = stem, 56
    for stage, (blocks, base) in enumerate(((3, 64), (4, 128), (6, 256), (3, 512)), start=2):
        inner, out = int(base * width), int(4 * base * width)
        for block in range(blocks):
            name = f"{stage}{'abcdef'[block]}"
            stride = 2 if stage > 2 and block == 0 else 1
            if block == 0:
                layers.append(Layer(f"{name}_projection", (1, 1, channels, out), size, stride))
            layers += [
                Layer(f"{name}_2a", (1, 1, channels, inner), size),
                Layer(f"{name}_2b", (3, 3, inner, inner), size, stride),
                Layer(f"{name}_2c", (1, 1, inner, out), size // stride),
            ]
            channels, size = out, size // stride
    return [*layers, Layer("classifier", (channels, 1000))]


def mobilenet_v1(width: float = 1.0) -> list[Layer]:
    """Lists the layers of MobileNet-v1 on 224x224 pixels, as in Keras.

    The classifier is a 1x1 convolution. Names end in `_dw` for depthwise and `_pw` for pointwise
    convolutions.
    """
    channels, size = int(32 * width), 112
    layers = [Layer("conv1", (3, 3, 3, channels), 225, 2)]
    outs = (64, 128, 128, 256, 256, 512, 512, 512, 512, 512, 512, 1024, 1024)
    for block, base in enumerate(outs, start=1):
        stride, out = (2 if block in (2, 4, 6, 12) else 1), int(base * width)
        padded = size + 1 if stride == 2 else size
        layers.append(Layer(f"{block}_dw", (3, 3, channels, 1), padded, stride))
        size //= stride
        layers.append(Layer(f"{block}_pw", (1, 1, channels, out), size))
        channels = out
    return [*layers, Layer("classifier", (1, 1, channels, 1000))]


def mobilenet_v2() -> list[Layer]:
    """Lists the layers of MobileNet-v2 1.0 on 224x224 pixels.

    Names end in `_expand`, `_dw`, `_project`. The paper has no FLOPs of it, so paddings and
    depthwise kernels are counted correctly.
    """
    layers = [Layer("conv1", (3, 3, 3, 32), 224, 2)]
    channels, size, block = 32, 112, 0
    groups = (
        (16, 1, 1), (24, 2, 2), (32, 3, 2), (64, 4, 2), (96, 3, 1), (160, 3, 2), (320, 1, 1),
    )  # fmt: skip
    for out, repeats, first_stride in groups:
        for repeat in range(repeats):
            stride = first_stride if repeat == 0 else 1
            wide = channels * (6 if block else 1)
            if block:
                layers.append(Layer(f"{block}_expand", (1, 1, channels, wide), size))
            layers.append(Layer(f"{block}_dw", (3, 3, 1, wide), size, stride))
            size //= stride
            layers.append(Layer(f"{block}_project", (1, 1, wide, out), size))
            channels, block = out, block + 1
    return [
        *layers,
        Layer("head", (1, 1, channels, 1280), size),
        Layer("classifier", (1280, 1000)),
    ]


def wide_resnet(depth: int = 22, width: int = 2) -> list[Layer]:
    """Lists the layers of a wide ResNet on 32x32 pixels (CIFAR-10), WRN-22-2 by default."""
    layers = [Layer("conv1", (3, 3, 3, 16), 32)]
    channels, size = 16, 32
    for group in range(3):
        out = 16 * 2**group * width
        for block in range((depth - 4) // 6):
            stride = 2 if group and block == 0 else 1
            name = f"{group + 1}_{block + 1}"
            if channels != out:
                layers.append(Layer(f"{name}_skip", (1, 1, channels, out), size, stride))
            layers.append(Layer(f"{name}_conv1", (3, 3, channels, out), size, stride))
            size //= stride
            layers.append(Layer(f"{name}_conv2", (3, 3, out, out), size))
            channels = out
    return [*layers, Layer("classifier", (channels, 10))]


def _densities(layers: Sequence[Layer], sparsity: Mapping[str, float] | None) -> dict[str, float]:
    sparsity = sparsity or {}
    names = [x.name for x in layers]
    unknown = [name for name in sparsity if name not in names]
    if unknown:
        raise ValueError(f"no layer {unknown}; layers are {names}")
    return {name: 1 - sparsity.get(name, 0.0) for name in names}
