"""Times single weights in CSR against dense ones: one layer, and training of an MLP.

    python benchmarks/condensed_csr.py

First one layer on a batch; CSR and dense take turns, and their medians and ratio are printed.
`forward` is one product, `gradients` the three products of a training step, `adam` these and the
optimizer, with weights and moments donated as in training.

Then whole training steps of an MLP 784-2048-2048-10 with Adam, all kernels but the last in CSR,
against the same dense one, in turn; every fifth round also takes a rewiring by `condensed.rigl`,
with `--candidates=1` among as many sampled positions as there are weights.
Memory is XLA's plan for one step: arguments (weights, optimizer state, topologies, batch) and
temporaries.
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import rigl_optax
from rigl_optax import condensed

ADAM = optax.adam(1e-3)


def forward(bind: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the compiled layer."""
    return jax.jit(lambda w, x, t: x @ bind(w, t))


def gradients(bind: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the compiled gradients with respect to the weights and the input."""
    return jax.jit(jax.grad(lambda w, x, t: jnp.sum((x @ bind(w, t)) ** 2), (0, 1)))


def adam(bind: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a compiled training step that also computes the gradient of the input."""

    def step(w: Any, x: jax.Array, t: Any, state: Any) -> tuple[Any, ...]:
        dw, dx = jax.grad(lambda w, x: jnp.sum((x @ bind(w, t)) ** 2), (0, 1))(w, x)
        updates, state = ADAM.update(dw, state, w)
        return optax.apply_updates(w, updates), dx, state

    compiled, states = jax.jit(step, donate_argnums=(0, 3)), {}

    def call(w: jax.Array, x: jax.Array, t: Any) -> Any:
        if not states:
            states["now"] = jnp.copy(w), ADAM.init(w)
        weights, dx, state = compiled(states["now"][0], x, t, states["now"][1])
        states["now"] = weights, state
        return dx

    return call


def network_loss(kernels: Any, x_BxD: jax.Array, labels_B: jax.Array) -> jax.Array:
    """Computes the loss of the MLP with dense or CSR kernels."""
    *hidden, last = kernels
    for layer in hidden:
        x_BxD = jax.nn.relu(x_BxD @ layer["kernel"] + layer["bias"])
    logits_BxC = x_BxD @ last["kernel"] + last["bias"]
    return optax.softmax_cross_entropy_with_integer_labels(logits_BxC, labels_B).mean()


def compiled(step: Callable[..., Any], *arguments: Any) -> tuple[Callable[..., Any], int]:
    """Compiles a step with its state donated; also returns the bytes that XLA plans for it."""
    program = jax.jit(step, donate_argnums=(0, 1)).lower(*arguments).compile()
    memory = program.memory_analysis()
    return program, memory.argument_size_in_bytes + memory.temp_size_in_bytes


def milliseconds(step: Callable[..., Any], state: Any, batch: Any) -> tuple[float, Any]:
    """Takes one step; returns its milliseconds and the new state."""
    start = time.perf_counter()
    state = jax.block_until_ready(step(*state, *batch))
    return 1e3 * (time.perf_counter() - start), state


def train(
    width: int, batch_size: int, sparsity: float, rounds: int, candidates: float | None
) -> None:
    """Trains both networks; prints medians of steps and of rewirings, and the bytes of each."""
    shapes = list(itertools.pairwise([784, width, width, 10]))
    rng = np.random.default_rng(0)
    batch = (
        jnp.asarray(rng.standard_normal((batch_size, 784)), jnp.float32),
        jnp.asarray(rng.integers(0, 10, batch_size)),
    )
    keys = jax.random.split(jax.random.key(0), len(shapes))
    params = [
        {"kernel": jax.random.normal(key, s) / s[0] ** 0.5, "bias": jnp.zeros(s[1])}
        for key, s in zip(keys, shapes, strict=True)
    ]
    topologies = {
        f"{i}/kernel": condensed.random_topology(
            s, sparsity, rigl_optax.Unstructured(), position=2 * i + 1
        )
        for i, s in enumerate(shapes[:-1])
    }
    weights = [
        {"kernel": condensed.random_values(keys[i], topology), "bias": jnp.zeros(topology.shape[1])}
        for i, topology in enumerate(topologies.values())
    ] + [jax.tree.map(jnp.copy, params[-1])]
    tx = condensed.rigl(ADAM, end=1_000_000, candidates=candidates)

    def dense(params: Any, state: Any, x: jax.Array, y: jax.Array) -> Any:
        updates, state = ADAM.update(jax.grad(network_loss)(params, x, y), state, params)
        return optax.apply_updates(params, updates), state

    def ordinary(weights: Any, state: Any, x: jax.Array, y: jax.Array) -> Any:
        gradient = condensed.value_and_grad(network_loss)
        _, grads = gradient(weights, state.topologies, x, y)
        updates, state = tx.update(grads, state, weights)
        return optax.apply_updates(weights, updates), state

    def rewiring(weights: Any, state: Any, x: jax.Array, y: jax.Array) -> Any:
        gradient = condensed.value_grad_and_scores(network_loss)
        _, *found = gradient(weights, state.topologies, x, y)
        return tx.rewire(*found, state, weights)

    states = {"dense": (params, ADAM.init(params)), "csr": (weights, tx.init(weights, topologies))}
    steps = {
        "dense": compiled(dense, *states["dense"], *batch),
        "csr": compiled(ordinary, *states["csr"], *batch),
        "rewiring": compiled(rewiring, *states["csr"], *batch),
    }
    times: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(rounds + 2):
        for name in ["dense", "csr", "rewiring"] if i % 5 == 1 else ["dense", "csr"]:
            side = "dense" if name == "dense" else "csr"
            taken, states[side] = milliseconds(steps[name][0], states[side], batch)
            if i >= 2 or name == "rewiring":
                times[name].append(taken)
    if int(states["csr"][1].rewirings) != len(times["rewiring"]):
        raise RuntimeError("a rewiring was refused")
    a, b, c = (statistics.median(x) for x in times.values())
    big, small, most = (size / 1e6 for _, size in steps.values())
    print(
        f"{sparsity:5.0%}{a:10.1f} ms{b:9.1f} ms{a / b:7.2f}{c:11.1f} ms"
        f"{big:9.0f} MB{small:6.0f} MB{big / small:6.1f}{most:11.0f} MB",
        flush=True,
    )


def main() -> None:
    """Prints two tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--sparsities", default=".9,.95,.98")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--candidates", type=float)
    parser.add_argument("--only-training", action="store_true", help="leaves out the one layer")
    options = parser.parse_args()
    if not options.only_training:
        print(f"{options.width}x{options.width}, batch {options.batch}, float32")
        for sparsity in map(float, options.sparsities.split(",")):
            one_layer(options.width, options.batch, sparsity, options.rounds)
    print(f"MLP 784-{options.width}-{options.width}-10, batch {options.batch}, Adam, float32")
    print("          dense        CSR  ratio      rewiring     dense     CSR  ratio   rewiring")
    for sparsity in map(float, options.sparsities.split(",")):
        train(options.width, options.batch, sparsity, options.rounds, options.candidates)


def one_layer(n: int, batch_size: int, sparsity: float, rounds: int) -> None:
    """Prints a row for each measurement: dense and CSR milliseconds, and their ratio."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((batch_size, n)), jnp.float32)
    dense = jnp.asarray(rng.standard_normal((n, n)) / n, jnp.float32)
    topology = condensed.csr_topology(rng.random((n, n)) >= sparsity)
    values = topology.extract(dense)
    for name, make in {"forward": forward, "gradients": gradients, "adam": adam}.items():
        sides = {
            "dense": (make(lambda w, _: w), (dense, x, None)),
            "csr": (make(condensed.CSR), (values, x, topology)),
        }
        times: dict[str, list[float]] = {side: [] for side in sides}
        for i in range(rounds + 1):
            for side, (function, arguments) in sides.items():
                start = time.perf_counter()
                jax.block_until_ready(function(*arguments))
                if i:
                    times[side].append(1e3 * (time.perf_counter() - start))
        a, b = (statistics.median(times[side]) for side in sides)
        print(f"{sparsity:5.0%}  {name:10}{a:8.1f} ms{b:8.1f} ms{a / b:7.2f}", flush=True)


if __name__ == "__main__":
    main()
