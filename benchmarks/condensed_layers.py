"""Times condensed layers against dense ones: convolutions, GRUs and an LSTM.

    python benchmarks/condensed_layers.py

Forward and backward pass of one layer; both take turns, and medians and their ratio are printed.
The dense side of a 1x1 convolution is also timed as a matmul: XLA's convolution on the CPU is
slower, which would flatter the condensed one. Densities are the real ones: a layer of few blocks
cannot have exactly the sparsity that was asked for.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rigl_optax import Block, condensed
from rigl_optax.models import recurrence

Case = tuple[Callable[..., Any], tuple[Any, ...]]
CONVOLUTIONS = {  # kernel, images
    "3x3, 128 channels, 16x16": ((3, 3, 128, 128), (32, 16, 16, 128)),
    "3x3, 256 channels, 8x8": ((3, 3, 256, 256), (32, 8, 8, 256)),
    "1x1, 512 channels, 14x14": ((1, 1, 512, 512), (16, 14, 14, 512)),
}
RECURRENT = {  # cell, units
    "GRU, 512 units": ("gru", 512),
    "GRU, 1024 units": ("gru", 1024),
    "LSTM, 1024 units": ("lstm", 1024),
}
SCANS = {  # gates, parts of the state, dense and condensed
    "gru": (3, 1, recurrence.gru, condensed.gru),
    "lstm": (4, 2, recurrence.lstm, condensed.lstm),
}
STEPS = LANES = 32


def array(seed: int, *shape: int) -> jax.Array:
    """Draws a standard normal array."""
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def gradient(function: Callable[..., jax.Array]) -> Callable[..., Any]:
    """Compiles the gradient of the sum of squares with respect to the first two arguments."""
    return jax.jit(jax.grad(lambda w, x, *rest: jnp.sum(function(w, x, *rest) ** 2), (0, 1)))


def convolution_cases(kernel: tuple[int, ...], images: tuple[int, ...]) -> dict[str, Case]:
    """Returns the gradient of the dense convolution; if it is 1x1, also that of a matmul."""

    def convolve(w: jax.Array, x: jax.Array) -> jax.Array:
        layout = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=layout)

    w, x = array(0, *kernel) / 20, array(1, *images)
    cases: dict[str, Case] = {"dense": (gradient(convolve), (w, x))}
    if kernel[:2] == (1, 1):
        cases["as a matmul"] = (gradient(lambda w, x: x @ w[0, 0]), (w, x))
    return cases


def condensed_convolution(
    kernel: tuple[int, ...], images: tuple[int, ...], block: Block, sparsity: float
) -> tuple[Case, float]:
    """Returns the gradient of the condensed convolution, and its real density."""
    topology = condensed.random_topology(kernel, sparsity, block)
    values = condensed.random_values(jax.random.key(0), topology)

    def convolve(v: jax.Array, x: jax.Array, t: condensed.BlockTopology) -> jax.Array:
        return condensed.convolve(x, condensed.BlockSparse(v, t))

    return (gradient(convolve), (values, array(1, *images), topology)), topology.density


def recurrent_case(
    cell: str, units: int, block: Block | None, sparsity: float
) -> tuple[Case, float]:
    """Returns the gradient of a scan with dense or condensed kernels, and their density."""
    gates, parts, dense, sparse = SCANS[cell]
    x = tuple(array(i, STEPS, LANES, units) for i in range(gates))
    first, keep = jnp.zeros((LANES, parts * units)), jnp.ones((STEPS, LANES, 1))
    if block is None:
        kernels = tuple(array(i, units, units) / 50 for i in range(gates))
        return (gradient(lambda k, x: dense(x, first, k, keep)[0]), (kernels, x)), 1.0
    topologies = [
        condensed.random_topology((units, units), sparsity, block, seed=i) for i in range(gates)
    ]
    values = tuple(condensed.random_values(jax.random.key(0), t) for t in topologies)

    def scan(v: Any, x: Any, topologies: Any) -> jax.Array:
        kernels = tuple(map(condensed.BlockSparse, v, topologies))
        return sparse(x, first, kernels, keep)[0]

    return (gradient(scan), (values, x, topologies)), topologies[0].density


def compare(name: str, cases: dict[str, Case], rounds: int) -> None:
    """Times all layers in turn and prints a line for each; the first is the dense layer."""
    times: dict[str, list[float]] = {case: [] for case in cases}
    for i in range(rounds + 1):
        for case, (function, arguments) in cases.items():
            start = time.perf_counter()
            jax.block_until_ready(function(*arguments))
            if i:
                times[case].append(1e3 * (time.perf_counter() - start))
    medians = {case: statistics.median(found) for case, found in times.items()}
    dense = medians["dense"]
    for case, found in medians.items():
        print(f"{name:28}{case:24}{found:8.1f} ms{dense / found:8.2f}", flush=True)


def main() -> None:
    """Prints a table: layer, form, milliseconds, and dense milliseconds divided by them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--blocks", default="16x16,32x32")
    parser.add_argument("--sparsities", default=".9,.95")
    parser.add_argument("--only", default="", help="part of a layer's name")
    options = parser.parse_args()
    blocks = [Block(*map(int, name.split("x"))) for name in options.blocks.split(",")]
    settings = [(b, s) for b in blocks for s in map(float, options.sparsities.split(","))]

    def label(block: Block, density: float) -> str:
        return f"{block.rows}x{block.cols}, density {density:.3f}"

    for name, (kernel, images) in CONVOLUTIONS.items():
        if options.only in name:
            cases = convolution_cases(kernel, images)
            for block, sparsity in settings:
                case, density = condensed_convolution(kernel, images, block, sparsity)
                cases[label(block, density)] = case
            compare(name, cases, options.rounds)
    for name, (cell, units) in RECURRENT.items():
        if options.only in name:
            cases = {"dense": recurrent_case(cell, units, None, 0.0)[0]}
            for block, sparsity in settings:
                case, density = recurrent_case(cell, units, block, sparsity)
                cases[label(block, density)] = case
            compare(name, cases, options.rounds)


if __name__ == "__main__":
    main()
