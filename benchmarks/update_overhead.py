"""Times the optimizer step and the whole training step of sparse against dense training.

Run with `make bench`, or `python benchmarks/update_overhead.py [--rounds 15] [--only resnet50]`.

Ours and plain Optax take turns in one process, with donated buffers, and their medians are
divided. Absolute times are not printed: they say more about the machine.

Rewirings are timed after all other steps. They need memory that ordinary steps do not, and the
allocator returns its pages during the next three steps, which makes even plain ones up to 1.4 times
as slow. GLIBC_TUNABLES=glibc.malloc.hugetlb=1 uses large pages.
"""

import argparse
import gc
import os
import statistics
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import shapes

import rigl_optax

PyTree = Any
MODELS = {
    "resnet50": shapes.resnet50(),
    "mobilenet_v1": shapes.mobilenet_v1(),
    "mlp": shapes.mlp(784, 1024, 1024, 10),
}
OPTIMIZERS = {
    "sgd momentum": lambda: optax.sgd(0.1, momentum=0.9),
    "adam": lambda: optax.adam(1e-3),
}


class Compiled(NamedTuple):
    """A compiled optimizer step, the seconds to compile it, and its temporary memory."""

    step: Any
    seconds: float
    temporary_bytes: int


def compile_step(tx: optax.GradientTransformation, params: PyTree, opt_state: PyTree) -> Compiled:
    """Compiles `(params, opt_state, grads) -> (params, opt_state)`, the first two donated."""

    def step(params, opt_state, grads):
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    start = time.perf_counter()
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, opt_state, params).compile()
    seconds = time.perf_counter() - start
    return Compiled(compiled, seconds, compiled.memory_analysis().temp_size_in_bytes)


def random_like(tree: PyTree, seed: int) -> PyTree:
    """Draws normal arrays of the shapes in `tree`."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: jnp.asarray(rng.standard_normal(x.shape, np.float32) * 0.05), tree
    )


def timed(function: Any, *args: Any) -> tuple[float, Any]:
    """Calls a function; returns the seconds it took and its result."""
    start = time.perf_counter()
    result = jax.block_until_ready(function(*args))
    return time.perf_counter() - start, result


def optimizer_step(model: str, optimizer: str, rounds: int) -> None:
    """Prints the ratios for one optimizer on one model's shapes."""
    plain_tx = OPTIMIZERS[optimizer]()
    sparse_tx = rigl_optax.rigl(plain_tx, rigl_optax.erk(0.9), end=10**6, every=100)
    grads = random_like(MODELS[model], 1)
    params, sparse_params = random_like(MODELS[model], 0), random_like(MODELS[model], 0)
    plain_state, sparse_state = plain_tx.init(params), sparse_tx.init(params)
    sparse_params = rigl_optax.apply_masks(sparse_params, sparse_state)
    plain = compile_step(plain_tx, params, plain_state)
    sparse = compile_step(sparse_tx, sparse_params, sparse_state)

    times: dict[str, list[float]] = {"plain": [], "ordinary": [], "rewiring": []}
    for kind, count in (("ordinary", 50), ("rewiring", 100)):
        for _ in range(rounds + 2):
            if kind == "ordinary":
                elapsed, (params, plain_state) = timed(plain.step, params, plain_state, grads)
                times["plain"].append(elapsed)
            state = sparse_state._replace(count=jnp.int32(count))
            elapsed, (sparse_params, sparse_state) = timed(sparse.step, sparse_params, state, grads)
            times[kind].append(elapsed)
    median = {kind: statistics.median(values[2:]) for kind, values in times.items()}
    weights = sum(x.size for x in jax.tree.leaves(params))
    extra = (sparse.temporary_bytes - plain.temporary_bytes) / weights
    print(
        f"{model:>13} | {optimizer:>12} | {median['ordinary'] / median['plain']:>8.2f} | "
        f"{median['rewiring'] / median['plain']:>8.1f} | {sparse.seconds:>7.1f} | "
        f"{plain.seconds:>5.1f} | {extra:>5.1f}",
        flush=True,
    )


def training_step(rounds: int) -> None:
    """Prints the ratio of whole training steps of LeNet-300-100 at batch 128."""
    batch = {
        "image": jnp.asarray(np.random.default_rng(0).standard_normal((128, 784), np.float32)),
        "label": jnp.asarray(np.random.default_rng(1).integers(0, 10, 128)),
    }

    def loss(params, batch):
        x = batch["image"]
        for name in ("dense0", "dense1"):
            x = jax.nn.relu(x @ params[name]["kernel"] + params[name]["bias"])
        logits = x @ params["dense2"]["kernel"] + params["dense2"]["bias"]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        return jnp.mean(losses)

    def train_step(tx):
        def step(params, opt_state, batch):
            value, grads = jax.value_and_grad(loss)(params, batch)
            updates, opt_state = tx.update(grads, opt_state, params)
            return optax.apply_updates(params, updates), opt_state, value

        return jax.jit(step, donate_argnums=(0, 1))

    plain_tx = optax.sgd(0.1, momentum=0.9, nesterov=True)
    runs = {}
    for name, tx in (
        ("dense", plain_tx),
        ("sparse", rigl_optax.rigl(plain_tx, rigl_optax.erk(0.95), end=10**6, every=100)),
    ):
        params = random_like(shapes.mlp(784, 300, 100, 10), 0)
        runs[name] = [train_step(tx), params, tx.init(params)]
    chunks: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(8 * rounds):
        # The order alternates.
        for name, (step, params, opt_state) in sorted(runs.items(), reverse=number % 2 == 1):
            start = time.perf_counter()
            for _ in range(100):  # one rewiring in each sparse chunk
                params, opt_state, _ = step(params, opt_state, batch)
            jax.block_until_ready(params)
            chunks[name].append(time.perf_counter() - start)
            runs[name][1:] = params, opt_state
    ratios = [s / d for s, d in zip(chunks["sparse"][2:], chunks["dense"][2:], strict=True)]
    low, middle, high = np.percentile(ratios, (25, 50, 75))
    print(
        f"\nwhole training step, LeNet-300-100, batch 128, Nesterov, a rewiring every 100 steps: "
        f"sparse / dense = {middle:.3f} (quartiles {low:.3f} to {high:.3f})"
    )


def main() -> None:
    """Runs the benchmarks."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", choices=list(MODELS), action="append")
    args = parser.parse_args()
    malloc = os.environ.get("GLIBC_TUNABLES", "stock malloc")
    print(
        f"RigL, ERK 0.9, against the plain optimizer: medians of {args.rounds} rounds in turn, "
        f"{malloc}"
    )
    print(
        "        model |    optimizer | ordinary | rewiring | compile | plain | extra\n"
        "              |              |        x |        x |       s |     s | B/weight"
    )
    for model in args.only or MODELS:
        for optimizer in OPTIMIZERS:
            optimizer_step(model, optimizer, args.rounds)
            gc.collect()
    training_step(args.rounds)


if __name__ == "__main__":
    main()
