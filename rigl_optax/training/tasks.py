"""What a run learns: the class of an image, or the next byte of a text."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from rigl_optax.data import (
    batches,
    cifar10,
    digits,
    fashion_mnist,
    image_folder,
    imagenet,
    resize,
    text,
)
from rigl_optax.models import recurrent
from rigl_optax.training import architectures, score
from rigl_optax.training.config import Config

PyTree = Any
Batch = dict[str, Any]
Rows: TypeAlias = np.ndarray | None
IMAGES: dict[str, Callable[[str, int], batches.Dataset]] = {
    "digits": digits.load,
    "fashion_mnist": fashion_mnist.load,
    "cifar10": cifar10.load,
}
PHOTOS: dict[str, Callable[[str, int, int, int, float], batches.Dataset]] = {
    "imagenet2012": imagenet.load,
    "image_folder": image_folder.load,
}
TEXTS: dict[str, Callable[[str], text.Text]] = {
    "tdavid": text.treasury_of_david,
    "topics": text.python_topics,
    "wikitext103": text.wikitext,
    "text": text.raw,
}
CELLS = ("gru", "lstm")


class Images(NamedTuple):
    """Images and their classes."""

    dataset: batches.Dataset

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Shape of one image."""
        return self.dataset.train.image_shape

    @property
    def left_out(self) -> tuple[str, ...]:
        """Records that could not be read so far."""
        return self.dataset.bad_records()

    @property
    def units(self) -> dict[str, float]:
        """What else a loss is told in, besides nats: its name, and nats in one."""
        return {}

    @property
    def score(self) -> score.Score:
        """What a run is judged by."""
        return score.ACCURACY

    def model(self, config: Config, width: float) -> nnx.Module:
        """A freshly initialised model, from the config's seed."""
        return architectures.build(config, self.image_shape, self.dataset.classes, width)

    def training_batch(self, config: Config, step: int, rows: Rows = None) -> Batch:
        """The batch of one training step; of `rows` alone if given."""
        return batches.training_batch(
            self.dataset.train,
            config.batch_size,
            seed=config.seed,
            step=step,
            rows=rows,
            augment=config.data.augment,
        )

    def evaluation_batches(
        self, config: Config, split: Any, size: int, rows: Rows = None
    ) -> Iterator[Batch]:
        """All of a split once, in batches of one shape with `weights`."""
        del config
        return batches.evaluation_batches(split, size, rows)

    def inputs(self, batch: Batch) -> tuple[jax.Array, ...]:
        """What the model is called with; runs on the device."""
        return (batches.normalised(batch, self.dataset),)

    def example(self, config: Config) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Inputs of one example, as FLOPs are counted by the example."""
        del config
        return (jax.ShapeDtypeStruct((1, *self.image_shape), jnp.float32),)

    def at_rest(self, model_state: PyTree, size: int) -> PyTree:
        """The model's state before a split of so many lanes is read: here the same."""
        del size
        return model_state


class Bytes(NamedTuple):
    """A text, and after each of its bytes the next; an example is a sequence."""

    dataset: text.Text

    @property
    def image_shape(self) -> tuple[int, ...]:
        """There are no images."""
        return ()

    @property
    def left_out(self) -> tuple[str, ...]:
        """Texts are read whole."""
        return ()

    @property
    def units(self) -> dict[str, float]:
        """Bits a byte."""
        return {score.BITS.key: float(np.log(2))}

    @property
    def score(self) -> score.Score:
        """What a run is judged by."""
        return score.BITS

    def model(self, config: Config, width: float) -> nnx.Module:
        """A freshly initialised model with a state for each lane of a batch."""
        return recurrent.StreamingLM(
            config.model.name,
            architectures.scaled(config.model.hidden, width),
            **architectures.model_options(config, recurrent.RecurrentLM),
            lanes=config.batch_size,
            rngs=nnx.Rngs(config.seed),
        )

    def training_batch(self, config: Config, step: int, rows: Rows = None) -> Batch:
        """The batch of one training step; of `rows` alone if given."""
        return text.training_batch(
            self.dataset.train,
            config.batch_size,
            config.data.sequence_length,
            seed=config.seed,
            step=step,
            rows=rows,
        )

    def evaluation_batches(
        self, config: Config, split: text.Part, size: int, rows: Rows = None
    ) -> Iterator[Batch]:
        """All of a split once, in batches of one shape with `weights`."""
        rows = np.arange(size) if rows is None else rows
        return text.evaluation_batches(
            split, config.eval.batch_size, config.data.sequence_length, rows
        )

    def inputs(self, batch: Batch) -> tuple[jax.Array, ...]:
        """What the model is called with."""
        return batch["tokens"], batch["resets"]

    def example(self, config: Config) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Inputs of one sequence, as FLOPs are counted by the example."""
        shape = (1, config.data.sequence_length)
        return jax.ShapeDtypeStruct(shape, jnp.uint8), jax.ShapeDtypeStruct(shape, jnp.bool_)

    def at_rest(self, model_state: PyTree, size: int) -> PyTree:
        """The model's state before a split of so many lanes is read."""
        return jax.tree.map(lambda x: np.zeros((size, *x.shape[1:]), x.dtype), model_state)


Task: TypeAlias = Images | Bytes


def find(config: Config) -> Task:
    """Loads the data of the task that the config names.

    Raises:
      ValueError: If there is no dataset or model of that name, or the model is not for it; if there
        are too few examples for a batch.
      FileNotFoundError: If the dataset is not there.
    """
    datasets, models = [*IMAGES, *PHOTOS, *TEXTS], [*architectures.ARCHITECTURES, *CELLS]
    for key, name, existing in (
        ("data", config.data.name, datasets),
        ("model", config.model.name, models),
    ):
        if name not in existing:
            raise ValueError(f"config.{key}.name={name!r}: must be one of {', '.join(existing)}")
    is_text = config.data.name in TEXTS
    fitting = CELLS if is_text else architectures.ARCHITECTURES
    if config.model.name not in fitting:
        raise ValueError(
            f"config.model.name={config.model.name!r}: models for {config.data.name} are "
            f"{', '.join(fitting)}"
        )
    if not is_text:
        if config.data.sequence_length != 0:
            raise ValueError(
                f"config.data.sequence_length={config.data.sequence_length}: images have none: 0"
            )
        images = _images(config)
        batches.steps_per_epoch(images.train.examples, config.batch_size)
        return Images(images)
    for key, value, only in (
        ("mesh.axes", config.mesh.axes, "auto"),
        ("model.dtype", config.model.dtype, "float32"),
        ("data.augment", config.data.augment, "none"),
        ("data.image_size", config.data.image_size, 0),
    ):
        if value != only:
            raise ValueError(f"config.{key}={value!r}: recurrent models are for {only!r} alone")
    found = TEXTS[config.data.name](config.data.dir)
    text.steps_per_epoch(len(found.train.tokens), config.batch_size, config.data.sequence_length)
    return Bytes(found)


def _images(config: Config) -> batches.Dataset:
    """A dataset of images in memory, or of photos in files."""
    if config.data.name in IMAGES:
        whole = IMAGES[config.data.name](config.data.dir, config.data.max_bad_records)
        return resize.resized(whole, config.data.image_size)
    if config.data.image_size == 0:
        raise ValueError(
            f"config.data.image_size=0: photos of {config.data.name} are of many sizes; give one, "
            "as 224"
        )
    if config.data.augment == "pad_crop":
        raise ValueError(
            f"config.data.augment='pad_crop': for {config.data.name} it is none or resized_crop"
        )
    return PHOTOS[config.data.name](
        config.data.dir,
        config.data.max_bad_records,
        config.data.image_size,
        config.data.threads,
        config.data.validation,
    )
