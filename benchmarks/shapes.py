"""Lists parameter shapes of well-known networks, for benchmarks that need no model."""

import itertools

import jax
import jax.numpy as jnp

Shapes = dict[str, dict[str, jax.ShapeDtypeStruct]]


def _conv(shapes: Shapes, name: str, *kernel: int) -> None:
    features = kernel[-2] if kernel[-1] == 1 else kernel[-1]
    shapes[name] = {"kernel": jax.ShapeDtypeStruct(kernel, jnp.float32)}
    shapes[name + "_bn"] = {
        leaf: jax.ShapeDtypeStruct((features,), jnp.float32) for leaf in ("scale", "bias")
    }


def _dense(shapes: Shapes, name: str, inputs: int, outputs: int) -> None:
    shapes[name] = {
        "kernel": jax.ShapeDtypeStruct((inputs, outputs), jnp.float32),
        "bias": jax.ShapeDtypeStruct((outputs,), jnp.float32),
    }


def resnet50() -> Shapes:
    """Returns the shapes of ResNet-50: 161 arrays, 25.6 M weights, 25,502,912 in kernels."""
    shapes: Shapes = {}
    _conv(shapes, "conv1", 7, 7, 3, 64)
    inputs = 64
    for stage, (width, blocks) in enumerate([(64, 3), (128, 4), (256, 6), (512, 3)]):
        for block in range(blocks):
            name = f"stage{stage}_block{block}"
            if block == 0:
                _conv(shapes, f"{name}_projection", 1, 1, inputs, 4 * width)
            _conv(shapes, f"{name}_conv1", 1, 1, inputs, width)
            _conv(shapes, f"{name}_conv2", 3, 3, width, width)
            _conv(shapes, f"{name}_conv3", 1, 1, width, 4 * width)
            inputs = 4 * width
    _dense(shapes, "fc", 2048, 1000)
    return shapes


def mobilenet_v1() -> Shapes:
    """Returns the shapes of MobileNet-v1; its depthwise kernels stay dense by default."""
    shapes: Shapes = {}
    _conv(shapes, "conv1", 3, 3, 3, 32)
    inputs = 32
    for block, width in enumerate([64, 128, 128, 256, 256, *[512] * 6, 1024, 1024]):
        _conv(shapes, f"block{block}_depthwise", 3, 3, 1, inputs)
        _conv(shapes, f"block{block}_pointwise", 1, 1, inputs, width)
        inputs = width
    _dense(shapes, "fc", 1024, 1000)
    return shapes


def mlp(*widths: int) -> Shapes:
    """Returns the shapes of a multilayer perceptron, as `mlp(784, 300, 100, 10)`."""
    shapes: Shapes = {}
    for layer, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
        _dense(shapes, f"dense{layer}", inputs, outputs)
    return shapes
