"""Times depthwise convolutions as sums of shifted images against XLA's grouped convolution.

    python benchmarks/depthwise.py [--size 96] [--batch 16]

Forward and backward pass of the 3x3 depthwise layers of MobileNet-v1; both take turns, and the
medians of each layer and of all layers together are printed.
"""

import argparse
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rigl_optax.models.depthwise import depthwise
from rigl_optax.models.mobilenet_v1 import BLOCKS, STEM

PADDING = ((1, 1), (1, 1))


def grouped(x: jax.Array, kernel: jax.Array, strides: Any, padding: Any) -> jax.Array:
    """Convolves as `nnx.Conv` does."""
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        strides,
        padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1],
    )


def compare(x: jax.Array, stride: int, rounds: int) -> tuple[float, float]:
    """Returns the milliseconds of the grouped convolution and of ours."""
    kernel = jnp.ones((3, 3, 1, x.shape[-1])) / 9
    times: dict[Any, list[float]] = {}
    compiled = {}
    for function in (grouped, depthwise):

        def loss(x: jax.Array, kernel: jax.Array, function: Any = function) -> jax.Array:
            return jnp.sum(function(x, kernel, (stride, stride), PADDING) ** 2)

        compiled[function] = jax.jit(jax.grad(loss, (0, 1)))
        times[function] = []
    for number in range(rounds + 1):
        for function, program in compiled.items():
            start = time.perf_counter()
            jax.block_until_ready(program(x, kernel))
            if number:
                times[function].append(1e3 * (time.perf_counter() - start))
    first, second = (statistics.median(found) for found in times.values())
    return first, second


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    side, channels, total = options.size // 2, STEM, np.zeros(2)
    print("images        stride   grouped ms   shifted ms   ratio")
    for outputs, stride in BLOCKS:
        shape = (options.batch, side, side, channels)
        x = jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)
        found = compare(x, stride, options.rounds)
        total += found
        size = f"{side}x{side}x{channels}"
        print(f"{size:14}{stride:6}{found[0]:13.1f}{found[1]:13.1f}{found[0] / found[1]:8.1f}")
        side, channels = -(-side // stride), outputs
    print(f"{'all':14}{'':6}{total[0]:13.1f}{total[1]:13.1f}{total[0] / total[1]:8.1f}")


if __name__ == "__main__":
    main()
