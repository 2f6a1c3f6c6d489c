"""Trains condensed networks under a memory limit in which their dense forms do not fit.

    make bigger-than-dense

An MLP predicts the next byte of a text from the eight before it: 2048-16384-16384-256, 306 million
dense weights, Adam. A GPT of width 2048 with 6 blocks, 303 million dense weights, AdamW, learns the
Treasury of David, and goes on from a prompt. Each form runs in a process of its own under
`RLIMIT_DATA`. The dense ones need 3.7 GB for weights and moments alone. The condensed ones, 98 %
sparse in blocks, never make a dense array, neither at initialisation nor at rewirings. A figure
shows the loss.
"""

import argparse
import functools
import itertools
import json
import math
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


def _sizes(options: argparse.Namespace) -> list[int]:
    width = options.width or 16_384
    return [INPUTS, width, width, 256]


def _gpt(options: argparse.Namespace) -> Any:
    """Returns a function that makes the library's GPT."""
    from flax import nnx

    from rigl_optax.models import transformer

    return lambda: transformer.GPT(
        embedding=options.width or 2048,
        depth=options.depth,
        heads=16,
        context=options.context,
        parts=4,
        rngs=nnx.Rngs(0),
    )


def _windows(tokens: Any, rng: Any, options: argparse.Namespace) -> Any:
    """Returns windows of bytes, and the bytes one further."""
    import numpy as np

    starts = rng.integers(0, len(tokens) - options.context - 1, options.windows)
    found = tokens[starts[:, None] + np.arange(options.context + 1)].astype(np.int32)
    return found[:, :-1], found[:, 1:]


def _adamw(options: argparse.Namespace, adamw: Any) -> Any:
    """Returns AdamW with a warm-up, a cosine to 0 and clipping, as in `configs/tdavid_gpt.py`."""
    import jax
    import optax

    rate = optax.warmup_cosine_decay_schedule(0, 3e-3, options.steps // 20, options.steps)

    def kernels(params: Any) -> Any:
        return jax.tree.map(lambda x: x.ndim >= 2, params)

    return optax.chain(
        optax.clip_by_global_norm(1.0), adamw(rate, b2=0.95, weight_decay=0.1, mask=kernels)
    )


def train_dense_gpt(options: argparse.Namespace) -> None:
    """Makes the dense GPT and takes a step; the memory limit should stop it before."""
    import jax
    import numpy as np
    import optax
    from flax import nnx

    graphdef, params, rest = nnx.split(_gpt(options)(), nnx.Param, ...)
    tx = _adamw(options, optax.adamw)
    state = jax.block_until_ready(tx.init(params))
    print("dense: weights and moments are there", flush=True)
    x, y = _windows(np.zeros(10_000, np.uint8), np.random.default_rng(0), options)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any) -> Any:
        def loss(params: Any) -> Any:
            logits = nnx.merge(graphdef, params, rest)(x)
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    jax.block_until_ready(step(params, state))
    print("dense: took a step", flush=True)


def train_condensed_gpt(options: argparse.Namespace) -> None:
    """Trains the condensed GPT with rewirings, and prints the result as a line of JSON."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax
    from flax import nnx

    import rigl_optax
    from rigl_optax import condensed
    from rigl_optax.condensed import layers
    from rigl_optax.data import text
    from rigl_optax.models import transformer
    from rigl_optax.training import sampling

    data = text.treasury_of_david()
    dense = rigl_optax.DenseLayers(transformer.dense_layers("uniform"))
    start = layers.initialize(
        _gpt(options),
        rigl_optax.uniform(options.sparsity, dense=dense),
        rigl_optax.Block(64, 64),
        key=jax.random.key(0),
    )
    tx = condensed.rigl(
        _adamw(options, rigl_optax.adamw), end=options.steps * 3 // 4, every=options.every
    )
    weights, state = start.weights, tx.init(start.weights, start.topologies)

    def loss(kernels: Any, x: Any, y: Any) -> Any:
        logits = nnx.merge(start.graphdef, kernels, start.rest)(x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    train, held_out = (
        functools.partial(_windows, part.tokens, options=options)
        for part in (data.train, data.validation)
    )
    weights, state, found = _trained(options, tx, loss, weights, state, train, held_out)
    prompt = np.frombuffer(options.prompt.encode(), np.uint8)
    window = jnp.zeros((1, options.context), jnp.uint8).at[0, : len(prompt)].set(prompt)
    drawn = sampling.draw_by_windows(
        start.graphdef,
        (condensed.bind(weights, state.topologies), start.rest),
        window,
        jnp.int32(len(prompt)),
        jax.random.split(jax.random.key(0), options.drawn),
        0.7,
    )
    goes_on = bytes(np.asarray(drawn).tolist()).decode("utf-8", "replace")
    _print_result(found, weights, state, text=options.prompt + goes_on)


def train_dense(options: argparse.Namespace) -> None:
    """Takes one step of the dense network; the memory limit should stop it before."""
    import jax
    import jax.numpy as jnp
    import optax

    sizes = _sizes(options)
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
    import optax

    import rigl_optax
    from rigl_optax import condensed
    from rigl_optax.data import text

    source = {"tdavid": text.treasury_of_david, "topics": text.python_topics}[options.dataset]
    data = source()
    block = rigl_optax.Block(32, 32)
    sizes = _sizes(options)
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

    train, held_out = (
        lambda rng, tokens=part.tokens: _batch(tokens, rng, options.batch)
        for part in (data.train, data.validation)
    )
    weights, state, found = _trained(options, tx, loss, weights, state, train, held_out)
    _print_result(found, weights, state)


def _trained(
    options: argparse.Namespace,
    tx: Any,
    loss: Any,
    weights: Any,
    state: Any,
    train: Any,
    held_out: Any,
) -> tuple[Any, Any, dict[str, Any]]:
    """Trains condensed weights; `train` and `held_out` make a batch of a random generator."""
    import jax
    import numpy as np
    import optax

    from rigl_optax import condensed

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

    def bits(weights: Any, state: Any) -> float:
        rng = np.random.default_rng(1)
        losses = [float(evaluate(weights, state.topologies, *held_out(rng))) for _ in range(8)]
        return sum(losses) / len(losses) / np.log(2)

    rng = np.random.default_rng(0)
    curve = [(0, bits(weights, state))]
    seconds: tuple[list[float], list[float]] = ([], [])
    for t in range(options.steps):
        batch = train(rng)
        start = time.perf_counter()
        which = int(tx.is_rewiring_step(t))
        weights, state, value = steps[which](weights, state, *batch)
        jax.block_until_ready(value)
        seconds[which].append(time.perf_counter() - start)
        if (t + 1) % options.log_every == 0:
            curve.append((t + 1, bits(weights, state)))
            print(f"step {t + 1}: {curve[-1][1]:.3f} bits a byte", file=sys.stderr, flush=True)
    tx.check(state)
    found = {"curve": curve}
    for name, taken in zip(("step_ms", "rewiring_ms"), seconds, strict=True):
        found[name] = 1e3 * sorted(taken)[len(taken) // 2] if taken else 0.0
    return weights, state, found


def _print_result(found: dict[str, Any], weights: Any, state: Any, **more: Any) -> None:
    """Prints a line of JSON."""
    import jax

    stored = sum(x.size for x in jax.tree.leaves(weights))
    absent = sum(math.prod(t.shape) - math.prod(t.values_shape) for t in state.topologies.values())
    sizes = {"stored_weights": stored, "dense_weights": stored + absent}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps(found | sizes | {"rewirings": int(state.rewirings), "peak_mb": peak} | more))


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
    parser.add_argument("--network", choices=["mlp", "gpt"], default="mlp")
    parser.add_argument("--form", choices=["both", "dense", "condensed"], default="both")
    parser.add_argument("--limit_gb", type=float, default=3.0)
    parser.add_argument("--width", type=int, default=0, help="0: 16,384 of the MLP, 2048 of GPT")
    parser.add_argument("--sparsity", type=float, default=0.98)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--every", type=int, default=100)
    parser.add_argument("--log_every", type=int, default=50)
    parser.add_argument("--dataset", choices=["tdavid", "topics"], default="topics")
    gpt = parser.add_argument_group("of the GPT")
    gpt.add_argument("--depth", type=int, default=6)
    gpt.add_argument("--context", type=int, default=128)
    gpt.add_argument("--windows", type=int, default=8, help="of a batch")
    gpt.add_argument("--prompt", default="The Lord")
    gpt.add_argument("--drawn", type=int, default=300, help="bytes to draw after the prompt")
    parser.add_argument("--figure", type=pathlib.Path, default=None)
    options = parser.parse_args()
    if options.form != "both":
        limit = int(options.limit_gb * 1e9)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        forms = {
            ("mlp", "dense"): train_dense,
            ("mlp", "condensed"): train_condensed,
            ("gpt", "dense"): train_dense_gpt,
            ("gpt", "condensed"): train_condensed_gpt,
        }
        forms[options.network, options.form](options)
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
            f"{result['step_ms']:.0f} ms a step, {result['rewiring_ms']:.0f} ms a rewiring, "
            f"peak {result['peak_mb']:.0f} MB, {result['rewirings']} rewirings; "
            f"{first:.2f} -> {last:.2f} bits a byte in {steps} steps"
        )
        if "text" in result:
            print(result["text"])
        if options.figure is not None:
            draw(result["curve"], options.figure)


if __name__ == "__main__":
    main()
