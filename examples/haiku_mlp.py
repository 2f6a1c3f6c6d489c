"""A Haiku model: `hk.transform` gives parameters in nested dicts, named `w` and `b`.

python examples/haiku_mlp.py
"""

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import rigl_optax


def main(steps: int = 1_000) -> float:
    """Trains for some steps, and returns the accuracy on unseen digits."""
    images, labels = load_digits(return_X_y=True)
    x, y = jnp.asarray(images / 16, jnp.float32), jnp.asarray(labels)

    model = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([300, 100, 10])(x)))
    params = model.init(jax.random.key(0), x[:1])
    tx = rigl_optax.sparse_evolutionary_training(
        optax.adamw(3e-3), sparsity=0.95, end=3 * steps // 4, every=50
    )
    opt_state = tx.init(params)

    @jax.jit
    def step(params, opt_state, x, y):
        def loss(params):
            logits = model.apply(params, x)
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

        updates, opt_state = tx.update(jax.grad(loss)(params), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    rng = np.random.default_rng(0)
    for _ in range(steps):
        rows = rng.integers(0, 1_300, 100)
        params, opt_state = step(params, opt_state, x[rows], y[rows])

    rigl_optax.check(params, opt_state)
    accuracy = float((model.apply(params, x[1_300:]).argmax(-1) == y[1_300:]).mean())
    print(f"{100 * accuracy:.1f} % of unseen digits right")
    return accuracy


if __name__ == "__main__":
    main()
