"""Compares initial Adam states of newly grown weights: at rest, or the mean of the layer.

Run with `python benchmarks/grown_state.py [--seeds 5]`. Trains 64-300-100-10 networks on
scikit-learn's digits with RigL and Adam at 95 % sparsity. Prints how far newly grown weights move
in their first steps, in units of the learning rate and relative to weights that stayed active, and
the validation accuracy of both, paired by seed.
"""

import argparse
import statistics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import rigl_optax
from rigl_optax.data import batches, digits

PyTree = Any
STEPS, EVERY, RATE, BATCH, FIRST = 2000, 50, 1e-3, 100, 10
STATES = ("rest", "mean_second_moment")


def initial(seed: int) -> PyTree:
    """Draws Glorot-uniform kernels and sets biases to zero."""
    rng = np.random.default_rng(seed)
    params = {}
    for i, (n, m) in enumerate(((64, 300), (300, 100), (100, 10))):
        bound = (6 / (n + m)) ** 0.5
        kernel = jnp.asarray(rng.uniform(-bound, bound, (n, m)), jnp.float32)
        params[f"dense{i}"] = {"kernel": kernel, "bias": jnp.zeros(m)}
    return params


def apply(params: PyTree, images: jax.Array) -> jax.Array:
    """Computes logits (batch, classes)."""
    x = images.reshape(len(images), -1)
    for i in range(3):
        x = x @ params[f"dense{i}"]["kernel"] + params[f"dense{i}"]["bias"]
        x = jax.nn.relu(x) if i < 2 else x
    return x


def run(seed: int, state_of_new: str, data: batches.Dataset) -> tuple[float, float, float]:
    """Returns validation accuracy in percent, and mean moves per step of new and other weights."""
    grown = rigl_optax.Grown(optimizer_state=state_of_new)
    tx = rigl_optax.rigl(
        optax.adam(RATE), 0.95, end=STEPS * 3 // 4, every=EVERY, grown=grown, seed=seed
    )
    params = initial(seed)
    state = tx.init(params)
    params = rigl_optax.apply_masks(params, state)

    def loss(params: PyTree, batch: dict[str, Any]) -> jax.Array:
        logits = apply(params, batches.to_float(batch["images"], maximum=data.maximum))
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"])
        return losses.mean()

    @jax.jit
    def step(params: PyTree, state: PyTree, batch: dict[str, Any]) -> tuple[PyTree, PyTree, PyTree]:
        updates, state = tx.update(jax.grad(loss)(params, batch), state, params)
        return optax.apply_updates(params, updates), state, updates

    moves: dict[bool, list[float]] = {True: [], False: []}
    new = None
    for t in range(STEPS):
        before = jax.device_get(state.masks)
        batch = batches.training_batch(data.train, BATCH, seed=seed, step=t)
        params, state, updates = step(params, state, batch)
        after = jax.device_get(state.masks)
        if t % EVERY == 0 and t < STEPS * 3 // 4:
            new = jax.tree.map(lambda a, b: a & ~b, after, before)
        elif new is not None and t >= STEPS // 4 and t < STEPS * 3 // 4 and t % EVERY <= FIRST:
            for name in ("dense0", "dense1"):
                size = np.abs(np.asarray(updates[name]["kernel"])) / RATE
                grew, is_active = new[name]["kernel"], after[name]["kernel"]
                for kind, where in ((True, grew & is_active), (False, ~grew & is_active)):
                    if where.any():  # late rewirings grow a few weights or none
                        moves[kind].append(float(size[where].mean()))
    images = batches.to_float(jnp.asarray(data.validation.images), maximum=data.maximum)
    right = apply(params, images).argmax(-1) == data.validation.labels
    return 100 * float(right.mean()), *(statistics.mean(moves[k]) for k in (True, False))


def main() -> None:
    """Runs both on all seeds and prints means and paired differences."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=5)
    args = parser.parse_args()
    data = digits.load("")
    found = {name: [run(seed, name, data) for seed in range(args.seeds)] for name in STATES}
    for name, runs in found.items():
        accuracy, new, other = zip(*runs, strict=True)
        spread = statistics.stdev(accuracy) if len(accuracy) > 1 else 0.0
        print(
            f"{name:>20}: validation {statistics.mean(accuracy):.2f} ± {spread:.2f} %; moves in "
            f"the first {FIRST} steps, in learning rates: new {statistics.mean(new):.2f}, "
            f"others {statistics.mean(other):.2f}"
        )
    differences = [b[0] - a[0] for a, b in zip(*found.values(), strict=True)]
    spread = statistics.stdev(differences) if len(differences) > 1 else 0.0
    print(
        f"mean_second_moment minus rest: {statistics.mean(differences):+.2f} ± {spread:.2f} points"
    )


if __name__ == "__main__":
    main()
