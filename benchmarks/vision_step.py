"""Times whole training steps of ResNet-50 and MobileNet-v1, sparse against dense.

Run with `make bench-vision`, or `python benchmarks/vision_step.py [--rounds 40] [--only resnet50]`.

Forward, backward, Nesterov and RigL (ERK, 90 %) in one compiled program, against the same without
RigL. In each round both take a step, in alternating order, and the ratio of the two is one
measurement; the median over all rounds and its 95 % bootstrap interval are printed. Rewirings are
timed separately and added as one step in a hundred. Masked weights are dense arrays: a sparse step
cannot be faster than a dense one; the aim is at most 5 % more.
"""

import argparse
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import rigl_optax
from rigl_optax.models import mobilenet_v1, resnet

PyTree = Any
MODELS = {
    "resnet50": (resnet.ResNet, resnet.dense_layers),
    "mobilenet_v1": (mobilenet_v1.MobileNetV1, mobilenet_v1.dense_layers),
}
EVERY = 100
TARGET = 1.05


class Trained(NamedTuple):
    """The state that a step updates."""

    params: PyTree
    model_state: PyTree
    opt_state: PyTree


def make_step(graphdef: nnx.GraphDef, tx: optax.GradientTransformation) -> Any:
    """Compiles `step(trained, batch) -> trained`, with `trained` donated."""

    def step(state: Trained, images: jax.Array, labels: jax.Array) -> Trained:
        def loss(params: PyTree) -> tuple[jax.Array, PyTree]:
            model = nnx.merge(graphdef, params, state.model_state)
            model.train()
            logits = model(images)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return losses.mean(), nnx.to_pure_dict(nnx.state(model, nnx.Not(nnx.Param)))

        grads, model_state = jax.grad(loss, has_aux=True)(state.params)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        return Trained(optax.apply_updates(state.params, updates), model_state, opt_state)

    return jax.jit(step, donate_argnums=0)


def interval(ratios: np.ndarray) -> tuple[float, float, float]:
    """Returns the median and the ends of its 95 % bootstrap interval."""
    drawn = np.random.default_rng(0).choice(ratios, (2000, len(ratios)))
    low, high = np.percentile(np.median(drawn, 1), (2.5, 97.5))
    return float(np.median(ratios)), float(low), float(high)


def compare(name: str, rounds: int, size: int, batch: int) -> None:
    """Prints the ratios for one model."""
    make, dense_layers = MODELS[name]
    graphdef, params, state = nnx.split(
        make((size, size, 3), 1000, rngs=nnx.Rngs(0)), nnx.Param, ...
    )
    params, state = nnx.to_pure_dict(params), nnx.to_pure_dict(state)
    dense_tx = optax.sgd(0.01, momentum=0.9, nesterov=True)
    layers = rigl_optax.erk(0.9, dense=rigl_optax.DenseLayers(dense_layers("erk")))
    sparse_tx = rigl_optax.rigl(dense_tx, layers, end=10**6, every=EVERY)
    generator = np.random.default_rng(0)
    images = jnp.asarray(generator.random((batch, size, size, 3), np.float32))
    labels = jnp.asarray(generator.integers(0, 1000, batch))
    steps, states = {}, {}
    for kind, tx in (("dense", dense_tx), ("sparse", sparse_tx)):
        steps[kind] = make_step(graphdef, tx)
        own = jax.tree.map(jnp.copy, params)
        opt_state = tx.init(own)
        if kind == "sparse":
            own = rigl_optax.apply_masks(own, opt_state)
        states[kind] = Trained(own, jax.tree.map(jnp.copy, state), opt_state)

    def take(kind: str, count: int = EVERY // 2) -> float:
        own = states[kind]
        if kind == "sparse":
            own = own._replace(opt_state=own.opt_state._replace(count=jnp.int32(count)))
        jax.block_until_ready(own)
        start = time.perf_counter()
        states[kind] = jax.block_until_ready(steps[kind](own, images, labels))
        return time.perf_counter() - start

    ordinary, rewiring = [], []
    for number in range(rounds + 2):
        order = ("dense", "sparse") if number % 2 else ("sparse", "dense")
        took = {kind: take(kind) for kind in order}
        if number < 2:
            continue  # the first calls compile and warm up
        ordinary.append(took["sparse"] / took["dense"])
        if number % 4 == 0:
            rewiring.append(take("sparse", EVERY) / took["dense"])
    once = float(np.median(rewiring))
    ratios = np.array(ordinary)
    low, middle, high = (interval(ratios)[i] for i in (1, 0, 2))
    share = (EVERY * middle + once) / (EVERY + 1)
    print(
        f"{name:>13} | {size}x{size} x {batch} | {middle:.3f} ({low:.3f} to {high:.3f}) | "
        f"{once:.2f} | {share:.3f} | {'yes' if share <= TARGET else 'no'}",
        flush=True,
    )


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--only", choices=list(MODELS), action="append")
    args = parser.parse_args()
    print(
        f"sparse / dense, whole training steps, {args.rounds} rounds in turn\n"
        f"        model | images | ordinary step (95 % interval) | rewiring | 1 in {EVERY} rewires "
        f"| <= {TARGET}"
    )
    for name in args.only or MODELS:
        compare(name, args.rounds, args.size, args.batch)


if __name__ == "__main__":
    main()
