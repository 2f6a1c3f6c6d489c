"""A network in plain JAX: parameters are a dict, the training step is a function. Start here.

    python examples/plain_jax.py

Trains on scikit-learn's digits at 95 % sparsity with RigL around AdamW.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import rigl_optax

WIDTHS = (64, 300, 100, 10)


def init(key: jax.Array, widths: Sequence[int] = WIDTHS) -> dict:
    """Draws the parameters of an MLP: kernels are (inputs, outputs)."""
    he = jax.nn.initializers.he_normal()
    keys = jax.random.split(key, len(widths) - 1)
    return {
        f"layer{i}": {"kernel": he(k, (n, m)), "bias": jnp.zeros(m)}
        for i, (k, n, m) in enumerate(zip(keys, widths[:-1], widths[1:], strict=True))
    }


def apply(params: dict, x: jax.Array) -> jax.Array:
    """Maps (batch, 64) images to (batch, 10) logits."""
    *hidden, last = params.values()
    for layer in hidden:
        x = jax.nn.relu(x @ layer["kernel"] + layer["bias"])
    return x @ last["kernel"] + last["bias"]


def loss(params: dict, x: jax.Array, y: jax.Array) -> jax.Array:
    """Returns the mean cross-entropy of a batch."""
    return optax.softmax_cross_entropy_with_integer_labels(apply(params, x), y).mean()


def main(steps: int = 2_000) -> float:
    """Trains for some steps, prints what came of it, and returns the accuracy on unseen digits."""
    images, labels = load_digits(return_X_y=True)
    x, y = jnp.asarray(images / 16, jnp.float32), jnp.asarray(labels)
    train, test = slice(0, 1_300), slice(1_300, None)

    params = init(jax.random.key(0))
    tx = rigl_optax.rigl(optax.adamw(3e-3), sparsity=0.95, end=3 * steps // 4, every=50)
    opt_state = tx.init(params)
    params = rigl_optax.apply_masks(params, opt_state)
    print(rigl_optax.explain(params, 0.95, end=3 * steps // 4, every=50))

    @jax.jit
    def step(params, opt_state, x, y):
        updates, opt_state = tx.update(jax.grad(loss)(params, x, y), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    rng = np.random.default_rng(0)
    for _ in range(steps):
        rows = rng.integers(0, train.stop, 100)
        params, opt_state = step(params, opt_state, x[rows], y[rows])

    rigl_optax.check(params, opt_state)  # raises if an inactive weight is not 0
    accuracy = float((apply(params, x[test]).argmax(-1) == y[test]).mean())
    active = sum(int(jnp.count_nonzero(layer["kernel"])) for layer in params.values())
    print(f"{100 * accuracy:.1f} % of unseen digits right, with {active:,} connections")
    return accuracy


if __name__ == "__main__":
    main()
