"""Defines LeNet-300-100, the multilayer perceptron of the paper's appendix B."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from rigl_optax.export import Units
from rigl_optax.models import layers

_glorot = nnx.initializers.glorot_uniform()


class LeNet(nnx.Module):
    """A fully connected ReLU network, 784-300-100-10 in the paper.

    Kernels start Glorot-uniform and biases at zero, as in the reference code
    (`mnist/mnist_train_eval.py`).

    Args:
      image_shape: Shape of one image, without the batch; it is flattened.
      classes: Number of logits.
      hidden: Width of each hidden layer.
      dtype: Dtype of activations; None: float32.
      rngs: Random keys for the initial weights (stream `params`).

    Raises:
      ValueError: If a width is below 1.

    Examples:
      >>> from flax import nnx
      >>> import jax.numpy as jnp
      >>> model = LeNet((28, 28), rngs=nnx.Rngs(0))
      >>> model(jnp.zeros((32, 28, 28))).shape
      (32, 10)
      >>> [layer.kernel.shape for layer in model.layers]
      [(784, 300), (300, 100), (100, 10)]
    """

    def __init__(
        self,
        image_shape: Sequence[int],
        classes: int = 10,
        hidden: Sequence[int] = (300, 100),
        *,
        dtype: Any = None,
        rngs: nnx.Rngs,
    ) -> None:
        widths = [math.prod(image_shape), *hidden, classes]
        if min(widths) < 1:
            raise ValueError(f"layer widths {widths}: every one must be at least 1")
        self.layers = nnx.List(
            layers.Linear(n_in, n_out, kernel_init=_glorot, dtype=dtype, rngs=rngs)
            for n_in, n_out in itertools.pairwise(widths)
        )

    def __call__(self, images_BxHxW: jax.Array) -> jax.Array:
        """Returns logits float32 (batch, classes) of images (batch, *image_shape)."""
        x_BxD = images_BxHxW.reshape(images_BxHxW.shape[0], -1)
        for layer in self.layers[:-1]:
            x_BxD = nnx.relu(layer(x_BxD))
        return self.layers[-1](x_BxD).astype(jnp.float32)

    def units(self, walk: Units) -> None:
        """Describes itself to `export.compact`; pixels stay."""
        x = walk.inputs(self.layers[0].kernel.shape[0])
        for i in range(len(self.layers) - 1):
            x = walk.relu(walk.layer(x, f"layers/{i}"))
        walk.outputs(walk.layer(x, f"layers/{len(self.layers) - 1}"))
