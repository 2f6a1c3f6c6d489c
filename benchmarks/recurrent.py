"""Times training of our recurrent language model against one built of Flax's own cells.

Run with `make bench-recurrent`, or `python benchmarks/recurrent.py [--units 512] [--rounds 10]`.

The other side is `nnx.RNN` of `nnx.GRUCell` or `nnx.OptimizedLSTMCell` in the same model: embedding
128, readout 256 and 128, tied logits, plain Adam, the state carried from step to step. Both compile
one step with donated state and take turns; ours also resets the state. Medians of tokens per second
are printed, and median and quartiles of their ratio over the rounds. `flax, time first` is
`nnx.RNN(time_major=True)`.
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
from flax import nnx

from rigl_optax.models import recurrent

PyTree = Any
CELLS = {"gru": nnx.GRUCell, "lstm": nnx.OptimizedLSTMCell}


class FlaxLM(nnx.Module):
    """The model of `recurrent.RecurrentLM` with one layer, built of Flax's cells."""

    def __init__(self, cell: str, units: int, *, time_major: bool, rngs: nnx.Rngs) -> None:
        self.time_major = time_major
        self.embedding = nnx.Embed(256, 128, rngs=rngs)
        self.layer = nnx.RNN(CELLS[cell](128, units, rngs=rngs), time_major=time_major)
        self.first = nnx.Linear(units, 256, rngs=rngs)
        self.second = nnx.Linear(256, 128, rngs=rngs)
        self.bias = nnx.Param(jnp.zeros((256,)))

    def __call__(self, tokens_BxT: jax.Array, carry: PyTree) -> tuple[jax.Array, PyTree]:
        """Returns logits (lanes, time, 256) and the state after the last step."""
        tokens = tokens_BxT.T if self.time_major else tokens_BxT
        x = self.embedding(tokens.astype(jnp.int32))
        carry, x = self.layer(x, initial_carry=carry, return_carry=True)
        logits = self.embedding.attend(self.second(nnx.relu(self.first(x)))) + self.bias[...]
        return (logits.swapaxes(0, 1) if self.time_major else logits), carry


def training_step(model: nnx.Module, resets: bool) -> tuple[Callable[..., Any], PyTree]:
    """Compiles a step `(state, batch) -> state`, state donated; also returns the first state."""
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    tx = optax.adam(1e-3)

    def loss_fn(params: PyTree, carry: PyTree, batch: dict[str, jax.Array]) -> Any:
        model = nnx.merge(graphdef, params, rest)
        inputs = (batch["tokens"], carry, *([batch["resets"]] if resets else []))
        logits, carry = model(*inputs)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"])
        return losses.mean(), carry

    def step(state: PyTree, batch: dict[str, jax.Array]) -> PyTree:
        params, opt_state, carry = state
        grads, carry = jax.grad(loss_fn, has_aux=True)(params, carry, batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, carry

    return jax.jit(step, donate_argnums=0), (params, tx.init(params))


def contestants(cell: str, units: int, lanes: int) -> dict[str, tuple[Callable[..., Any], PyTree]]:
    """Returns `{name: (compiled training step, first state)}`."""
    zeros = [jnp.zeros((lanes, units)) for _ in range(recurrent.STATES[cell])]  # type: ignore[index]
    found = {}
    ours = recurrent.RecurrentLM(cell, (units,), rngs=nnx.Rngs(0))  # type: ignore[arg-type]
    step, state = training_step(ours, resets=True)
    found["ours"] = (step, (*state, ours.initial_carry(lanes)))
    for name, time_major in (("flax", False), ("flax, time first", True)):
        step, state = training_step(
            FlaxLM(cell, units, time_major=time_major, rngs=nnx.Rngs(0)), resets=False
        )
        # Flax's LSTM holds (cell, output); a GRU's state is one array. Buffers are donated.
        carry = [zero.copy() for zero in zeros]
        found[name] = (step, (*state, carry[0] if len(carry) == 1 else tuple(carry)))
    return found


def compare(cell: str, units: int, lanes: int, length: int, rounds: int) -> None:
    """Times all contestants and prints a line for each."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 256, (lanes, length + 1), np.uint8)
    batch = {
        "tokens": jnp.asarray(tokens[:, :-1]),
        "labels": jnp.asarray(tokens[:, 1:].astype(np.int32)),
        "resets": jnp.asarray(rng.random((lanes, length)) < 0.001),
    }
    running = contestants(cell, units, lanes)
    states = {}
    for name, (step, state) in running.items():
        states[name] = jax.block_until_ready(step(state, batch))
    rates: dict[str, list[float]] = {name: [] for name in running}
    for number in range(rounds):
        names = list(running) if number % 2 else list(running)[::-1]  # who comes first takes turns
        for name in names:
            start = time.perf_counter()
            for _ in range(3):
                states[name] = running[name][0](states[name], batch)
            jax.block_until_ready(states[name])
            rates[name].append(3 * lanes * length / (time.perf_counter() - start))
    print(f"{cell}, {units} units, {lanes} lanes of {length}")
    for name, found in rates.items():
        line = f"  {name:18}{statistics.median(found):10,.0f} tokens/s"
        if name != "ours":
            ratios = [ours / theirs for ours, theirs in zip(rates["ours"], found, strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4)
            line += f"   ours is {middle:.2f}x ({low:.2f} to {high:.2f})"
        print(line, flush=True)


def main() -> None:
    """Compares both cells at each width."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--cells", nargs="+", default=list(CELLS), choices=list(CELLS))
    parser.add_argument("--units", nargs="+", type=int, default=[256, 512])
    parser.add_argument("--lanes", type=int, default=32)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=10)
    given = parser.parse_args()
    for cell in given.cells:
        for units in given.units:
            compare(cell, units, given.lanes, given.length, given.rounds)


if __name__ == "__main__":
    main()
