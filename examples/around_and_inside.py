"""Clipping, a schedule and accumulation inside; an average of the weights outside.

    python examples/around_and_inside.py

What scales or adds to updates goes *inside* the wrapper, so that inactive weights stay exactly 0.
An exponential average of the weights keeps connections that were dropped: its masked copy is what
is evaluated.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import plain_jax
from sklearn.datasets import load_digits

import rigl_optax


def main(steps: int = 2_000) -> float:
    """Trains for some steps, and returns the accuracy of the averaged weights."""
    images, labels = load_digits(return_X_y=True)
    x, y = jnp.asarray(images / 16, jnp.float32), jnp.asarray(labels)

    parts = 4  # batches that make one step
    updates_in_all = steps // parts
    inner = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(optax.warmup_cosine_decay_schedule(0, 6e-3, 20, updates_in_all)),
    )
    # `MultiSteps` goes around: then a rewiring sees the gradient of all parts. `end` and `every`
    # count updates of the optimizer, not batches.
    sparse = rigl_optax.rigl(inner, sparsity=0.95, end=3 * updates_in_all // 4, every=25)
    tx = optax.MultiSteps(sparse, every_k_schedule=parts)

    params = plain_jax.init(jax.random.key(0))
    opt_state = tx.init(params)
    params = rigl_optax.apply_masks(params, opt_state)
    average = params

    @jax.jit
    def step(params, opt_state, average, x, y):
        grads = jax.grad(plain_jax.loss)(params, x, y)
        updates, opt_state = tx.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        return params, opt_state, optax.incremental_update(params, average, 0.02)

    rng = np.random.default_rng(0)
    for _ in range(steps):
        rows = rng.integers(0, 1_300, 25)
        params, opt_state, average = step(params, opt_state, average, x[rows], y[rows])

    rigl_optax.check(params, opt_state)
    average = rigl_optax.apply_masks(average, opt_state)
    accuracy = float((plain_jax.apply(average, x[1_300:]).argmax(-1) == y[1_300:]).mean())
    print(f"{100 * accuracy:.1f} % of unseen digits right")
    return accuracy


if __name__ == "__main__":
    main()
