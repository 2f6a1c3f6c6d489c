"""A Flax NNX model: `nnx.Optimizer` takes the wrapped optimizer like any other.

python examples/flax_nnx.py
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits

import rigl_optax


class Net(nnx.Module):
    """A small convolutional network."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.conv1 = nnx.Conv(1, 32, (3, 3), rngs=rngs)
        self.conv2 = nnx.Conv(32, 64, (3, 3), strides=2, rngs=rngs)
        self.norm = nnx.BatchNorm(64, rngs=rngs)
        self.head = nnx.Linear(4 * 4 * 64, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (batch, 8, 8, 1) images to (batch, 10) logits."""
        x = nnx.relu(self.conv1(x))
        x = nnx.relu(self.norm(self.conv2(x)))
        return self.head(x.reshape(len(x), -1))


@nnx.jit
def step(model: Net, optimizer: nnx.Optimizer, x: jax.Array, y: jax.Array) -> jax.Array:
    """Takes a step and returns the loss."""

    def loss(model):
        return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()

    value, grads = nnx.value_and_grad(loss)(model)
    optimizer.update(model, grads)
    return value


def main(steps: int = 500) -> float:
    """Trains for some steps, and returns the accuracy on unseen digits."""
    images, labels = load_digits(return_X_y=True)
    x = jnp.asarray(images / 16, jnp.float32).reshape(-1, 8, 8, 1)
    y = jnp.asarray(labels)

    model = Net(nnx.Rngs(0))
    tx = rigl_optax.rigl(optax.adamw(2e-3), sparsity=0.9, end=3 * steps // 4, every=50)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    params = nnx.state(model, nnx.Param)  # goes wherever a pytree of parameters does
    nnx.update(model, rigl_optax.apply_masks(params, optimizer.opt_state))

    rng = np.random.default_rng(0)
    for _ in range(steps):
        rows = rng.integers(0, 1_300, 64)
        step(model, optimizer, x[rows], y[rows])

    rigl_optax.check(nnx.state(model, nnx.Param), optimizer.opt_state)
    model.eval()
    accuracy = float((model(x[1_300:]).argmax(-1) == y[1_300:]).mean())
    print(f"{100 * accuracy:.1f} % of unseen digits right")
    return accuracy


if __name__ == "__main__":
    main()
