"""Single weights in CSR against the same dense layer: its products, and a step of Adam.

    python benchmarks/condensed_csr.py

One layer on a batch, timed in turn; printed are the medians of both and their ratio. `forward` is
one product, `gradients` all three of a training step, `adam` these and the optimizer, with the
weights and moments donated, as in training.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rigl_optax import condensed

ADAM = optax.adam(1e-3)


def forward(bind: Callable[..., Any]) -> Callable[..., Any]:
    """The layer itself."""
    return jax.jit(lambda w, x, t: x @ bind(w, t))


def gradients(bind: Callable[..., Any]) -> Callable[..., Any]:
    """With respect to the weights and to what comes in."""
    return jax.jit(jax.grad(lambda w, x, t: jnp.sum((x @ bind(w, t)) ** 2), (0, 1)))


def adam(bind: Callable[..., Any]) -> Callable[..., Any]:
    """A whole step, with the gradient of what comes in too."""

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


def main() -> None:
    """Prints a table: sparsity, what is timed, dense and CSR milliseconds, and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--sparsities", default=".9,.95,.98")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    rng, n = np.random.default_rng(0), options.width
    x = jnp.asarray(rng.standard_normal((options.batch, n)), jnp.float32)
    dense = jnp.asarray(rng.standard_normal((n, n)) / n, jnp.float32)
    print(f"{n}x{n}, batch {options.batch}, float32")
    for sparsity in map(float, options.sparsities.split(",")):
        topology = condensed.csr_topology(rng.random((n, n)) >= sparsity)
        values = topology.extract(dense)
        for name, make in {"forward": forward, "gradients": gradients, "adam": adam}.items():
            sides = {
                "dense": (make(lambda w, _: w), (dense, x, None)),
                "csr": (make(condensed.CSR), (values, x, topology)),
            }
            times: dict[str, list[float]] = {side: [] for side in sides}
            for i in range(options.rounds + 1):
                for side, (function, arguments) in sides.items():
                    start = time.perf_counter()
                    jax.block_until_ready(function(*arguments))
                    if i:
                        times[side].append(1e3 * (time.perf_counter() - start))
            a, b = (statistics.median(times[side]) for side in sides)
            print(f"{sparsity:5.0%}  {name:10}{a:8.1f} ms{b:8.1f} ms{a / b:7.2f}", flush=True)


if __name__ == "__main__":
    main()
