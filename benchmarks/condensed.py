"""Times whole training steps with condensed weights against the same dense model, in one run.

    make bench-condensed
    python benchmarks/condensed.py --sparsities=.9,.95,.98 --blocks=32x32,16x16
    python benchmarks/condensed.py --widths=512,1024,2048 --sparsities=.5,.8,.9,.95,.98 \
        --blocks=32x32 --steps=5 --figure=docs/images/condensed_cost.png

An MLP 784-2048-2048-2048-10 with Adam at batch 256, forward, backward and update; every kernel
but the last is condensed. Both take turns, so that a busy machine slows both; medians and their
ratio are printed. Memory is XLA's plan for one step: arguments (weights, optimizer state, batch)
and temporaries. A rewiring is one step with scores, drop and growth.
"""

import argparse
import itertools
import pathlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import rigl_optax
from rigl_optax import condensed

PyTree = Any
Step = Callable[..., Any]


def shapes(inputs: int, width: int, depth: int, classes: int) -> list[tuple[int, int]]:
    """Returns the shapes of the kernels, from the first to the last."""
    sizes = [inputs, *[width] * depth, classes]
    return list(itertools.pairwise(sizes))


def loss_dense(params: PyTree, x_BxD: jax.Array, labels_B: jax.Array) -> jax.Array:
    """Computes the loss of the dense network, with the batch as the first axis."""
    for layer in params[:-1]:
        x_BxD = jax.nn.relu(x_BxD @ layer["kernel"] + layer["bias"])
    logits_BxC = x_BxD @ params[-1]["kernel"] + params[-1]["bias"]
    return optax.softmax_cross_entropy_with_integer_labels(logits_BxC, labels_B).mean()


def loss_condensed(params: PyTree, x_BxD: jax.Array, labels_B: jax.Array) -> jax.Array:
    """Computes the loss of the same network with condensed kernels, features first inside."""
    x_DxB = x_BxD.T
    for layer in params[:-1]:
        x_DxB = condensed.matmul(x_DxB, layer["kernel"], features_first=True)
        x_DxB = jax.nn.relu(x_DxB + layer["bias"][:, None])
    logits_BxC = x_DxB.T @ params[-1]["kernel"] + params[-1]["bias"]
    return optax.softmax_cross_entropy_with_integer_labels(logits_BxC, labels_B).mean()


def compiled(step: Step, *arguments: Any) -> tuple[Step, int]:
    """Compiles a step with its state donated; also returns the bytes that XLA plans for it."""
    program = jax.jit(step, donate_argnums=(0, 1)).lower(*arguments).compile()
    memory = program.memory_analysis()
    return program, memory.argument_size_in_bytes + memory.temp_size_in_bytes


def dense_model(layers: list[tuple[int, int]], inner: Any, batch: tuple[Any, ...]) -> Any:
    """Returns the step, its bytes, and the initial state."""
    rng = np.random.default_rng(0)
    params = [
        {
            "kernel": jnp.asarray(rng.standard_normal(s) / s[0] ** 0.5, jnp.float32),
            "bias": jnp.zeros(s[1]),
        }
        for s in layers
    ]

    def step(params: PyTree, state: PyTree, x: jax.Array, y: jax.Array) -> Any:
        grads = jax.grad(loss_dense)(params, x, y)
        updates, state = inner.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = inner.init(params)
    return *compiled(step, params, state, *batch), (params, state)


def condensed_model(
    layers: list[tuple[int, int]],
    inner: Any,
    batch: tuple[Any, ...],
    sparsity: float,
    block: rigl_optax.Block,
    loss: Callable[..., jax.Array],
) -> Any:
    """Returns the step, its bytes, the initial state, and a rewiring step."""
    rng = np.random.default_rng(0)
    weights: list[dict[str, jax.Array]] = []
    topologies = {}
    for i, shape in enumerate(layers[:-1]):
        topology = condensed.random_topology(shape, sparsity, block, position=i)
        values = rng.standard_normal(topology.values_shape) / (shape[0] * (1 - sparsity)) ** 0.5
        weights.append({"kernel": jnp.asarray(values, jnp.float32), "bias": jnp.zeros(shape[1])})
        topologies[f"{i}/kernel"] = topology
    last = rng.standard_normal(layers[-1]) / layers[-1][0] ** 0.5
    weights.append({"kernel": jnp.asarray(last, jnp.float32), "bias": jnp.zeros(layers[-1][1])})
    tx = condensed.rigl(inner, end=1_000_000)

    def step(weights: PyTree, state: PyTree, x: jax.Array, y: jax.Array) -> Any:
        gradient = condensed.value_and_grad(loss)
        _, grads = gradient(weights, state.topologies, x, y)
        updates, state = tx.update(grads, state, weights)
        return optax.apply_updates(weights, updates), state

    def rewire(weights: PyTree, state: PyTree, x: jax.Array, y: jax.Array) -> Any:
        gradient = condensed.value_grad_and_scores(loss)
        _, grads, scores = gradient(weights, state.topologies, x, y)
        return tx.rewire(grads, scores, state, weights)

    state = tx.init(weights, topologies)
    program, size = compiled(step, weights, state, *batch)
    return program, size, (weights, state), compiled(rewire, weights, state, *batch)


def milliseconds(step: Step, state: Any, batch: tuple[Any, ...]) -> tuple[float, Any]:
    """Takes one step; returns its milliseconds and the new state."""
    start = time.perf_counter()
    state = jax.block_until_ready(step(*state, *batch))
    return 1e3 * (time.perf_counter() - start), state


class Row(NamedTuple):
    """Medians for one network: milliseconds of a step, and its bytes."""

    width: int
    block: str
    sparsity: float
    dense: float
    condensed: float
    rewiring: float
    dense_bytes: int
    bytes: int


def measured(width: int, options: argparse.Namespace) -> Iterator[Row]:
    """Measures one width at each block shape and sparsity."""
    layers = shapes(784, width, 3, 10)
    rng = np.random.default_rng(1)
    batch = (
        jnp.asarray(rng.standard_normal((options.batch, 784)), jnp.float32),
        jnp.asarray(rng.integers(0, 10, options.batch)),
    )
    inner = optax.adam(1e-4)
    dense, dense_bytes, dense_state = dense_model(layers, inner, batch)
    for name in options.blocks.split(","):
        rows, cols = map(int, name.split("x"))
        for sparsity in map(float, options.sparsities.split(",")):
            block = rigl_optax.Block(rows, cols, pad=True)
            loss = loss_dense if options.features_last else loss_condensed
            made = condensed_model(layers, inner, batch, sparsity, block, loss)
            step, size, state, (rewire, _) = made
            times: dict[str, list[float]] = {"dense": [], "condensed": [], "rewiring": []}
            for i in range(options.steps + 2):
                one, dense_state = milliseconds(dense, dense_state, batch)
                two, state = milliseconds(step, state, batch)
                if i % 5 == 1:
                    three, state = milliseconds(rewire, state, batch)
                    times["rewiring"].append(three)
                if i >= 2:
                    times["dense"].append(one)
                    times["condensed"].append(two)
            medians = (statistics.median(x) for x in times.values())
            yield Row(width, name, sparsity, *medians, dense_bytes, size)


def draw(rows: Sequence[Row], batch: int, path: pathlib.Path) -> None:
    """Draws speed-up and memory saving against sparsity, a line for each width and block."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, (speed, memory) = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
    for width, block in dict.fromkeys((row.width, row.block) for row in rows):
        own = [row for row in rows if (row.width, row.block) == (width, block)]
        densities = [100 * (1 - row.sparsity) for row in own]
        label = f"{width} units, {block}"
        speed.plot(densities, [r.dense / r.condensed for r in own], marker="o", label=label)
        memory.plot(densities, [r.dense_bytes / r.bytes for r in own], marker="o", label=label)
    for axes, what in ((speed, "times as fast as dense"), (memory, "times smaller than dense")):
        axes.axhline(1, color="0.6", linewidth=0.8)
        axes.set(xscale="log", yscale="log", xlabel="density, percent", ylabel=what)
        ticks = sorted({100 * (1 - row.sparsity) for row in rows})
        axes.set_xticks(ticks, [f"{tick:g}" for tick in np.round(ticks, 6)], minor=False)
        axes.set_xticks([], minor=True)
        axes.set_yticks([0.5, 1, 2, 5, 10, 20], ["0.5", "1", "2", "5", "10", "20"], minor=False)
        axes.set_yticks([], minor=True)
    speed.legend(fontsize=8)
    figure.suptitle(f"A step of an MLP of three hidden layers, Adam, batch {batch}", fontsize=10)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sparsities", default=".9,.95,.98")
    parser.add_argument("--blocks", default="32x32,16x16")
    parser.add_argument("--widths", default="2048")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument(
        "--features-last", action="store_true", help="condensed products of x [batch, features]"
    )
    parser.add_argument("--figure", type=pathlib.Path, help="also draws them")
    options = parser.parse_args()
    print(f"MLP 784-width x3-10, Adam, batch {options.batch}, {jax.devices()[0].platform}")
    print(
        "width  block   sparsity   dense ms   condensed ms   ratio   rewiring ms   dense MB   MB  "
        " ratio"
    )
    rows = []
    for width in map(int, options.widths.split(",")):
        for row in measured(width, options):
            rows.append(row)
            d, c, big, small = row.dense, row.condensed, row.dense_bytes, row.bytes
            print(
                f"{width:<7}{row.block:8}{row.sparsity:8.2f}{d:11.1f}{c:15.1f}{d / c:8.1f}"
                f"{row.rewiring:14.1f}{big / 1e6:11.0f}{small / 1e6:5.0f}{big / small:8.1f}",
                flush=True,
            )
    if options.figure is not None:
        draw(rows, options.batch, options.figure)
        print(f"wrote {options.figure}")


if __name__ == "__main__":
    main()
