"""An Equinox model: kernels are (outputs, inputs, height, width), and the first layer stays dense.

python examples/equinox_conv.py
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import rigl_optax


def make(key: jax.Array) -> eqx.nn.Sequential:
    """Builds a network for images of (1, 8, 8)."""
    keys = jax.random.split(key, 3)
    return eqx.nn.Sequential(
        [
            eqx.nn.Conv2d(1, 32, 3, padding=1, key=keys[0]),
            eqx.nn.Lambda(jax.nn.relu),
            eqx.nn.Conv2d(32, 64, 3, stride=2, padding=1, key=keys[1]),
            eqx.nn.Lambda(jax.nn.relu),
            eqx.nn.Lambda(jnp.ravel),
            eqx.nn.Linear(4 * 4 * 64, 10, key=keys[2]),
        ]
    )


def main(steps: int = 500) -> float:
    """Trains for some steps, and returns the accuracy on unseen digits."""
    images, labels = load_digits(return_X_y=True)
    x = jnp.asarray(images / 16, jnp.float32).reshape(-1, 1, 8, 8)
    y = jnp.asarray(labels)

    # What is trained is the arrays of the model: the rest (functions, sizes) is static.
    params, static = eqx.partition(make(jax.random.key(0)), eqx.is_inexact_array)

    # `equinox_axes` says which axes of a kernel are inputs. A kernel that is not in `dense` is
    # sparse; the reason is what `explain` prints.
    distribution = rigl_optax.erk(
        0.9,
        axes=rigl_optax.equinox_axes,
        dense=rigl_optax.DenseLayers({r"^layers/0/": "the first convolution has 288 weights"}),
    )
    print(rigl_optax.explain(params, distribution, end=3 * steps // 4, every=50))
    tx = rigl_optax.rigl(optax.adamw(2e-3), distribution, end=3 * steps // 4, every=50)
    opt_state = tx.init(params)

    def logits(params, x):
        return jax.vmap(eqx.combine(params, static))(x)

    @jax.jit
    def step(params, opt_state, x, y):
        def loss(params):
            return optax.softmax_cross_entropy_with_integer_labels(logits(params, x), y).mean()

        updates, opt_state = tx.update(jax.grad(loss)(params), opt_state, params)
        return eqx.apply_updates(params, updates), opt_state

    rng = np.random.default_rng(0)
    for _ in range(steps):
        rows = rng.integers(0, 1_300, 64)
        params, opt_state = step(params, opt_state, x[rows], y[rows])

    rigl_optax.check(params, opt_state)
    accuracy = float((logits(params, x[1_300:]).argmax(-1) == y[1_300:]).mean())
    print(f"{100 * accuracy:.1f} % of unseen digits right")
    return accuracy


if __name__ == "__main__":
    main()
