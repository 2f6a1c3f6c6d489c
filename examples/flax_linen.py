"""A Flax Linen model with batch normalisation, in a `TrainState`.

python examples/flax_linen.py
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax.training import train_state
from sklearn.datasets import load_digits

import rigl_optax


class Net(nn.Module):
    """A small convolutional network."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Maps (batch, 8, 8, 1) images to (batch, 10) logits."""
        for features in (32, 64):
            x = nn.Conv(features, (3, 3), strides=2)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        return nn.Dense(10)(x.reshape(len(x), -1))


class TrainState(train_state.TrainState):
    """Flax's own state, and the running statistics of the normalisation."""

    batch_stats: Any


@jax.jit
def step(state: TrainState, x: jax.Array, y: jax.Array) -> TrainState:
    """Takes a step; `apply_gradients` needs nothing special."""

    def loss(params):
        logits, new = state.apply_fn(
            {"params": params, "batch_stats": state.batch_stats},
            x,
            train=True,
            mutable=["batch_stats"],
        )
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), new

    grads, new = jax.grad(loss, has_aux=True)(state.params)
    return state.apply_gradients(grads=grads, batch_stats=new["batch_stats"])


def main(steps: int = 500) -> float:
    """Trains for some steps, and returns the accuracy on unseen digits."""
    images, labels = load_digits(return_X_y=True)
    x = jnp.asarray(images / 16, jnp.float32).reshape(-1, 8, 8, 1)
    y = jnp.asarray(labels)

    model = Net()
    variables = model.init(jax.random.key(0), x[:1], train=False)
    tx = rigl_optax.rigl(optax.adamw(2e-3), sparsity=0.9, end=3 * steps // 4, every=50)
    state = TrainState.create(
        apply_fn=model.apply,
        params=variables["params"],
        tx=tx,
        batch_stats=variables["batch_stats"],
    )
    state = state.replace(params=rigl_optax.apply_masks(state.params, state.opt_state))

    rng = np.random.default_rng(0)
    for _ in range(steps):
        rows = rng.integers(0, 1_300, 64)
        state = step(state, x[rows], y[rows])

    rigl_optax.check(state.params, state.opt_state)
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    logits = model.apply(variables, x[1_300:], train=False)
    accuracy = float((logits.argmax(-1) == y[1_300:]).mean())
    print(f"{100 * accuracy:.1f} % of unseen digits right")
    return accuracy


if __name__ == "__main__":
    main()
