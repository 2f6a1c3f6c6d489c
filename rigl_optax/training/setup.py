"""From a config to what a run is made of: data, model, optimizer, state."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import optax
from flax import nnx

from rigl_optax.data import batches, digits, fashion_mnist
from rigl_optax.models import lenet
from rigl_optax.training import methods, state
from rigl_optax.training.config import Config

DATASETS: dict[str, Callable[[str], batches.Dataset]] = {
    "digits": digits.load,
    "fashion_mnist": fashion_mnist.load,
}
MODELS: dict[str, Callable[..., nnx.Module]] = {"lenet": lenet.LeNet}


class Run(NamedTuple):
    """What a run is made of.

    Attributes:
      dataset: The data, on the host.
      graphdef: The model's static part.
      tx: The optimizer, with the method around it.
      initial: The state at step 0.
    """

    dataset: batches.Dataset
    graphdef: nnx.GraphDef
    tx: optax.GradientTransformation
    initial: state.TrainState

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Shape of one image."""
        return self.dataset.train.images.shape[1:]

    @property
    def to_float(self) -> Callable[[jax.Array], jax.Array]:
        """From integer images to what the model takes; runs on the device."""
        return functools.partial(batches.to_float, maximum=self.dataset.maximum)


def prepare(config: Config) -> Run:
    """Loads the data and draws initial weights and masks from the config's seed.

    Raises:
      ValueError: If the config names a dataset, model or method that does not exist; it lists
        those that do.
      FileNotFoundError: If the dataset is not there.
    """
    for key, existing in (("dataset", DATASETS), ("model", MODELS)):
        if getattr(config, key) not in existing:
            raise ValueError(
                f"config.{key}={getattr(config, key)!r}: {key}s are {', '.join(existing)}"
            )
    tx = methods.build(config)
    dataset = DATASETS[config.dataset](config.data_dir)
    batches.steps_per_epoch(len(dataset.train.labels), config.batch_size)
    image_shape = dataset.train.images.shape[1:]

    def make_model() -> nnx.Module:
        rngs = nnx.Rngs(config.seed)
        return MODELS[config.model](image_shape, dataset.classes, config.hidden, rngs=rngs)

    method = methods.find(config)
    graphdef, initial = state.create(make_model, tx, masked=method.masked, rewires=method.rewires)
    return Run(dataset, graphdef, tx, initial)
