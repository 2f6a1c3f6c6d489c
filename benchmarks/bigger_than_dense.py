"""Trains a condensed network under a memory limit in which its dense form does not fit.

    make bigger-than-dense

An MLP predicts the next byte of a text from the eight before it: 2048-16384-16384-256, 306 million
dense weights, Adam. Each form runs in a process of its own under `RLIMIT_DATA`. The dense one needs
3.7 GB for weights and moments alone. The condensed one, 98 % sparse in blocks of 32x32, never
makes a dense array, neither at initialisation nor at rewirings. A figure shows its loss.
"""

import argparse
import itertools
import json
import pathlib
import resource
import subprocess
import sys
import time
from typing import Any

CONTEXT = 8
INPUTS = CONTEXT * 256


def _batch(tokens: Any, rng: Any, size: int) -> Any:
    """Returns contexts of eight bytes as one-hot columns, and the bytes after them."""
    import numpy as np

    starts = rng.integers(0, len(tokens) - CONTEXT - 1, size)
    context = tokens[starts[:, None] + np.arange(CONTEXT)].astype(np.int64)
    x_DxB = np.zeros((INPUTS, size), np.float32)
    x_DxB[context + np.arange(CONTEXT) * 256, np.arange(size)[:, None]] = 1
    return x_DxB, tokens[starts + CONTEXT].astype(np.int32)


def train_dense(options: argparse.Namespace) -> None:
    """Takes one step of the dense network; the memory limit should stop it before."""
    import jax
    import jax.numpy as jnp
    import optax

    sizes = [INPUTS, options.width, options.width, 256]
    keys = jax.random.split(jax.random.key(0), 3)
    params = [
        jax.random.normal(k, (o, i)) * i**-0.5
        for k, i, o in zip(keys, sizes[:-1], sizes[1:], strict=True)
    ]
    tx = optax.adam(1e-3)
    state = tx.init(params)
    jax.block_until_ready((params, state))
    print("dense: weights and moments are there", flush=True)

    def loss(params: Any, x: Any, y: Any) -> Any:
        for kernel in params[:-1]:
            x = jax.nn.relu(kernel @ x)
        logits = (params[-1] @ x).T
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    @jax.jit
    def step(params: Any, state: Any, x: Any, y: Any) -> Any:
        updates, state = tx.update(jax.grad(loss)(params, x, y), state, params)
        return optax.apply_updates(params, updates), state

    x, y = jnp.zeros((INPUTS, options.batch)), jnp.zeros(options.batch, jnp.int32)
    jax.block_until_ready(step(params, state, x, y))
    print("dense: took a step", flush=True)


def train_condensed(options: argparse.Namespace) -> None:
    """Trains the condensed network with rewirings, and prints the result as a line of JSON."""
    import jax
    import numpy as np
    import optax

    import rigl_optax
    from rigl_optax import condensed
    from rigl_optax.data import text

    source = {"tdavid": text.treasury_of_david, "topics": text.python_topics}[options.dataset]
    data = source()
    block = rigl_optax.Block(32, 32)
    sizes = [INPUTS, options.width, options.width, 256]
    topologies, weights = {}, {}
    for i, shape in enumerate(itertools.pairwise(sizes)):
        name = f"kernel_{i}"
        topologies[name] = condensed.random_topology(shape, options.sparsity, block, position=i)
        weights[name] = condensed.random_values(jax.random.key(i), topologies[name])
    tx = condensed.rigl(optax.adam(1e-3), end=options.steps * 3 // 4, every=options.every)
    state = tx.init(weights, topologies)

    def loss(kernels: Any, x_DxB: Any, y_B: Any) -> Any:
        for i in range(2):
            kernel = kernels[f"kernel_{i}"]
            x_DxB = jax.nn.relu(condensed.matmul(x_DxB, kernel, features_first=True))
        logits = condensed.matmul(x_DxB, kernels["kernel_2"], features_first=True).T
        return optax.softmax_cross_entropy_with_integer_labels(logits, y_B).mean()

    def ordinary(weights: Any, state: Any, x: Any, y: Any) -> Any:
        value, grads = condensed.value_and_grad(loss)(weights, state.topologies, x, y)
        updates, state = tx.update(grads, state, weights)
        return optax.apply_updates(weights, updates), state, value

    def rewiring(weights: Any, state: Any, x: Any, y: Any) -> Any:
        gradient = condensed.value_grad_and_scores(loss)
        value, grads, scores = gradient(weights, state.topologies, x, y)
        return *tx.rewire(grads, scores, state, weights), value

    steps = [jax.jit(step, donate_argnums=(0, 1)) for step in (ordinary, rewiring)]
    evaluate = jax.jit(lambda w, t, x, y: loss(condensed.bind(w, t), x, y))

    def held_out(weights: Any, state: Any) -> float:
        rng = np.random.default_rng(1)
        batches = [_batch(data.validation.tokens, rng, options.batch) for _ in range(8)]
        losses = [float(evaluate(weights, state.topologies, *batch)) for batch in batches]
        return sum(losses) / len(losses) / np.log(2)

    rng = np.random.default_rng(0)
    curve = [(0, held_out(weights, state))]
    seconds = []
    for t in range(options.steps):
        batch = _batch(data.train.tokens, rng, options.batch)
        start = time.perf_counter()
        which = int(tx.is_rewiring_step(t))
        weights, state, value = steps[which](weights, state, *batch)
        jax.block_until_ready(value)
        if not which:
            seconds.append(time.perf_counter() - start)
        if (t + 1) % options.log_every == 0:
            curve.append((t + 1, held_out(weights, state)))
            print(f"step {t + 1}: {curve[-1][1]:.3f} bits a byte", file=sys.stderr, flush=True)
    print(
        json.dumps(
            {
                "curve": curve,
                "step_ms": 1e3 * sorted(seconds)[len(seconds) // 2],
                "rewirings": int(state.rewirings),
                "stored_weights": sum(x.size for x in jax.tree.leaves(weights)),
                "dense_weights": sum(int(np.prod(t.shape)) for t in topologies.values()),
                "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            }
        )
    )


def draw(curve: list[tuple[int, float]], path: pathlib.Path) -> None:
    """Draws bits per byte on the validation split against training steps."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    axes.plot(*zip(*curve, strict=True))
    axes.set(xlabel="training steps", ylabel="bits a byte, validation")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Runs both forms under the limit and prints their results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--form", choices=["both", "dense", "condensed"], default="both")
    parser.add_argument("--limit_gb", type=float, default=3.0)
    parser.add_argument("--width", type=int, default=16_384)
    parser.add_argument("--sparsity", type=float, default=0.98)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--every", type=int, default=100)
    parser.add_argument("--log_every", type=int, default=50)
    parser.add_argument("--dataset", choices=["tdavid", "topics"], default="topics")
    parser.add_argument("--figure", type=pathlib.Path, default=None)
    options = parser.parse_args()
    if options.form != "both":
        limit = int(options.limit_gb * 1e9)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        {"dense": train_dense, "condensed": train_condensed}[options.form](options)
        return
    for form in ("dense", "condensed"):
        run = subprocess.run(
            [sys.executable, *sys.argv, f"--form={form}"], stdout=subprocess.PIPE,
            stderr=subprocess.PIPE if form == "dense" else None, text=True, check=False,
        )  # fmt: skip
        if form == "dense":
            found = [line for line in run.stderr.splitlines() if "memory" in line.lower()]
            why = (found or run.stderr.splitlines() or [""])[-1][:150]
            print(f"dense under {options.limit_gb} GB: exit status {run.returncode}: {why}")
            if run.returncode == 0:
                sys.exit("the dense network fits: choose a lower limit")
            continue
        if run.returncode:
            sys.exit(f"condensed: exit status {run.returncode}")
        result = json.loads(run.stdout.splitlines()[-1])
        (_, first), (steps, last) = result["curve"][0], result["curve"][-1]
        print(
            f"condensed: {result['stored_weights']:,} of {result['dense_weights']:,} weights, "
            f"{result['step_ms']:.0f} ms a step, peak {result['peak_mb']:.0f} MB, "
            f"{result['rewirings']} rewirings; {first:.2f} -> {last:.2f} bits a byte "
            f"in {steps} steps"
        )
        if options.figure is not None:
            draw(result["curve"], options.figure)


if __name__ == "__main__":
    main()
