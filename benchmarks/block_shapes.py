"""Measures layers of square blocks against dense ones; prints rigl_optax/condensed/_measured.py.

    python benchmarks/block_shapes.py > rigl_optax/condensed/_measured.py

Times forward and backward pass of one layer at batch 256, or of a 3x3 convolution of 16 images of
14x14 pixels. The dense layer and all densities take turns, and medians of the ratios are printed.
Takes minutes on an idle machine.
"""

import statistics
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rigl_optax import Block, condensed

WIDTHS = {"product": (128, 256, 512, 1024, 2048), "convolution": (64, 128, 256, 512)}
SIZES = (16, 32, 64)
DENSITIES = (0.02, 0.05, 0.1, 0.2, 0.5)
ROUNDS = 5


def array(seed: int, *shape: int) -> jax.Array:
    """Draws a standard normal array."""
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def layer(kind: str, x: jax.Array, kernel: Any) -> jax.Array:
    """Applies a layer with a dense or a condensed kernel."""
    if kind == "product":
        return x @ kernel
    if isinstance(kernel, condensed.BlockSparse):
        return condensed.convolve(x, kernel)
    layout = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=layout)


def ratios(kind: str, width: int, size: int) -> list[float]:
    """Returns dense time / time with blocks, at each density."""
    window = () if kind == "product" else (3, 3)
    shape = (*window, width, width)
    x = array(0, 256, width) if kind == "product" else array(0, 16, 14, 14, width)

    @jax.jit
    def gradient(values: Any, x: jax.Array, topology: Any) -> Any:
        def loss(values: Any, x: jax.Array) -> jax.Array:
            kernel = values if topology is None else condensed.BlockSparse(values, topology)
            return jnp.sum(layer(kind, x, kernel) ** 2)

        return jax.grad(loss, (0, 1))(values, x)

    cases: list[tuple[Any, Any]] = [(array(1, *shape) / width, None)]
    for density in DENSITIES:
        topology = condensed.random_topology(shape, 1 - density, Block(size, size))
        cases.append((condensed.random_values(jax.random.key(0), topology), topology))
    times: list[list[float]] = [[] for _ in cases]
    for number in range(ROUNDS + 1):
        for found, (values, topology) in zip(times, cases, strict=True):
            start = time.perf_counter()
            jax.block_until_ready(gradient(values, x, topology))
            if number:
                found.append(time.perf_counter() - start)
    dense = times[0]
    return [
        statistics.median(d / t for d, t in zip(dense, found, strict=True)) for found in times[1:]
    ]


def main() -> None:
    """Prints the module, and its progress on standard error."""
    print(
        '"""Ratios that `benchmarks/block_shapes.py` measured and wrote: do not edit by hand."""\n'
    )
    print("# Widths of each kind of layer, and densities. RATIOS has, by kind and size of blocks,")
    print("# a row for each width: dense time over theirs at each density, forward and backward.")
    print(f"WIDTHS = {WIDTHS}")
    print(f"DENSITIES = {DENSITIES}")
    print("RATIOS = {")
    for kind, widths in WIDTHS.items():
        for size in SIZES:
            print(f'    ("{kind}", {size}): (')
            for width in widths:
                found = ratios(kind, width, size) if size < width else [0.1] * len(DENSITIES)
                print(f"        ({', '.join(f'{ratio:.2f}' for ratio in found)}),", flush=True)
                print(kind, size, width, file=sys.stderr)
            print("    ),")
    print("}")


if __name__ == "__main__":
    main()
