"""A vision transformer of this library, with AdamW whose step count is one per weight.

python examples/vit.py
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits

import rigl_optax
from rigl_optax.models import transformer


@nnx.jit
def step(model: nnx.Module, optimizer: nnx.Optimizer, x: jax.Array, y: jax.Array) -> jax.Array:
    """Takes a step and returns the loss."""

    def loss(model):
        return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()

    value, grads = nnx.value_and_grad(loss)(model)
    optimizer.update(model, grads)
    return value


def main(steps: int = 600) -> float:
    """Trains for some steps, and returns the accuracy on unseen digits."""
    images, labels = load_digits(return_X_y=True)
    x = jnp.asarray(images / 8 - 1, jnp.float32).reshape(-1, 8, 8)
    y = jnp.asarray(labels)

    model = transformer.ViT(
        (8, 8), 10, patch=2, embedding=64, depth=2, heads=4, pooled=True, rngs=nnx.Rngs(0)
    )
    # The model names the layers that stay dense: patch embedding and head.
    dense = rigl_optax.DenseLayers(transformer.dense_layers("erk"))
    distribution = rigl_optax.erk(0.9, dense=dense)
    print(
        rigl_optax.explain(nnx.state(model, nnx.Param), distribution, end=3 * steps // 4, every=50)
    )
    tx = rigl_optax.rigl(
        rigl_optax.adamw(optax.warmup_cosine_decay_schedule(0, 6e-3, steps // 20, steps)),
        distribution,
        end=3 * steps // 4,
        every=50,
    )
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    rng = np.random.default_rng(0)
    for _ in range(steps):
        rows = rng.integers(0, 1_300, 64)
        step(model, optimizer, x[rows], y[rows])

    rigl_optax.check(nnx.state(model, nnx.Param), optimizer.opt_state)
    accuracy = float((model(x[1_300:]).argmax(-1) == y[1_300:]).mean())
    print(f"{100 * accuracy:.1f} % of unseen digits right")
    return accuracy


if __name__ == "__main__":
    main()
