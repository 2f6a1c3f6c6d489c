"""What a run learns: the class of an image, or the next byte of a text."""

import functools
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
    photos,
    resize,
    text,
    tfds,
)
from rigl_optax.models import recurrent, transformer
from rigl_optax.training import architectures, score
from rigl_optax.training.config import TFDS, Config

PyTree = Any
Batch = dict[str, Any]
Rows: TypeAlias = np.ndarray | None
IMAGES: dict[str, Callable[[str, int], batches.Dataset]] = {
    "digits": digits.load,
    "fashion_mnist": fashion_mnist.load,
    "cifar10": cifar10.load,
}
# In [0, 1] unless they are standardised; the others have a scaling of their own.
UNSCALED = ("digits", "fashion_mnist")
PHOTOS: dict[str, Callable[[str, int, int, int, float], batches.Dataset]] = {
    "imagenet2012": imagenet.load,
    "image_folder": image_folder.load,
}
TEXTS: dict[str, Callable[[str], text.Text]] = {
    "tdavid": text.treasury_of_david,
    "topics": text.python_topics,
    "wikitext103": text.wikitext,
    "text": text.raw,
    "tokens": text.token_files,
}


class Facts(NamedTuple):
    """What a model has to know of its images: all of a dataset but the examples.

    A workdir keeps them, so that a run can be restored where the dataset is not.

    Attributes:
      image_shape: Of one image.
      classes: Number of classes.
      maximum: As in `rigl_optax.data.batches.Dataset`, and so the others.
      mean: Of the channels; may be empty.
      deviation: Of the channels; may be empty.
    """

    image_shape: tuple[int, ...] = ()
    classes: int = 0
    maximum: float = 0.0
    mean: tuple[float, ...] = ()
    deviation: tuple[float, ...] = ()


class Images(NamedTuple):
    """Images and their classes.

    Attributes:
      facts: What does not need the dataset.
      load: Returns the dataset, read when it is first asked for.
    """

    facts: Facts
    load: Callable[[], batches.Dataset]

    @property
    def dataset(self) -> batches.Dataset:
        """The examples; read from disk if they are not there yet."""
        return self.load()

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Shape of one image."""
        return self.facts.image_shape

    @property
    def bad_records(self) -> tuple[str, ...]:
        """Records that could not be read so far."""
        return self.dataset.bad_records()

    @property
    def units(self) -> dict[str, float]:
        """Units of a loss besides nats: `{name: nats in one}`."""
        return {}

    @property
    def score(self) -> score.Score:
        """The measure by which runs are compared."""
        return score.ACCURACY

    def model(self, config: Config, width: float) -> nnx.Module:
        """Makes a freshly initialised model, from the config's seed."""
        return architectures.build(config, self.image_shape, self.facts.classes, width)

    def training_batch(self, config: Config, step: int, rows: Rows = None) -> Batch:
        """Makes the batch of one training step; of `rows` alone if given."""
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
        """Yields all of a split once, in batches of one shape with `weights`."""
        del config
        return batches.evaluation_batches(split, size, rows)

    def inputs(self, batch: Batch) -> tuple[jax.Array, ...]:
        """Returns the arguments of the model; runs on the device."""
        return (batches.normalised(batch, self.facts),)

    def example(self, config: Config) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Returns the shapes of the inputs of one example: FLOPs are counted per example."""
        del config
        return (jax.ShapeDtypeStruct((1, *self.image_shape), jnp.float32),)

    def at_rest(self, model_state: PyTree, size: int) -> PyTree:
        """Returns the model's state before a split of `size` lanes is read: here the same."""
        del size
        return model_state


class Bytes(NamedTuple):
    """A text, and after each of its bytes the next; an example is a sequence.

    Attributes:
      load: Returns the text, read when it is first asked for.
    """

    load: Callable[[], text.Text]

    @property
    def dataset(self) -> text.Text:
        """The text; read from disk if it is not there yet."""
        return self.load()

    @property
    def facts(self) -> Facts:
        """Empty: a model of bytes has to know nothing of its text."""
        return Facts()

    @property
    def image_shape(self) -> tuple[int, ...]:
        """There are no images."""
        return ()

    @property
    def bad_records(self) -> tuple[str, ...]:
        """Texts are read whole."""
        return ()

    @property
    def units(self) -> dict[str, float]:
        """Bits a byte."""
        return {score.BITS.key: float(np.log(2))}

    @property
    def score(self) -> score.Score:
        """The measure by which runs are compared."""
        return score.BITS

    def model(self, config: Config, width: float) -> nnx.Module:
        """Makes a freshly initialised model with a state for each lane of a batch."""
        return recurrent.StreamingLM(
            config.model.name,
            architectures.scaled(config.model.hidden, width),
            **architectures.model_options(config, recurrent.RecurrentLM),
            lanes=config.batch_size,
            rngs=nnx.Rngs(config.seed),
        )

    def training_batch(self, config: Config, step: int, rows: Rows = None) -> Batch:
        """Makes the batch of one training step; of `rows` alone if given."""
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
        """Yields all of a split once, in batches of one shape with `weights`."""
        rows = np.arange(size) if rows is None else rows
        return text.evaluation_batches(
            split, config.eval.batch_size, config.data.sequence_length, rows
        )

    def inputs(self, batch: Batch) -> tuple[jax.Array, ...]:
        """Returns the arguments of the model."""
        return batch["tokens"], batch["resets"]

    def example(self, config: Config) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Returns the shapes of the inputs of one sequence: FLOPs are counted per example."""
        shape = (1, config.data.sequence_length)
        return jax.ShapeDtypeStruct(shape, jnp.uint8), jax.ShapeDtypeStruct(shape, jnp.bool_)

    def at_rest(self, model_state: PyTree, size: int) -> PyTree:
        """Returns the model's state before a split of `size` lanes is read: zeros."""
        return jax.tree.map(lambda x: np.zeros((size, *x.shape[1:]), x.dtype), model_state)


class Windows(Bytes):
    """A text of bytes or tokens, read in windows that know nothing of each other: for transformers.

    A window is a sequence of `config.data.sequence_length`, which is the model's context.
    """

    def model(self, config: Config, width: float) -> nnx.Module:
        """Makes a freshly initialised transformer, from the config's seed."""
        if config.model.hidden:
            raise ValueError(
                f"config.model.hidden={config.model.hidden}: {config.model.name} has widths of its "
                "own, `embedding`, `depth` and `heads`: leave it empty"
            )
        options = architectures.model_options(config, transformer.GPT)
        return transformer.GPT(
            width,
            **{"context": config.data.sequence_length} | options,
            dtype=jnp.dtype(config.model.dtype),
            rngs=nnx.Rngs(config.seed),
        )

    def inputs(self, batch: Batch) -> tuple[jax.Array, ...]:
        """Returns what the model is called with."""
        return (batch["tokens"],)

    def example(self, config: Config) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Returns the shape of one sequence, as FLOPs are counted by the example."""
        return (jax.ShapeDtypeStruct((1, config.data.sequence_length), jnp.uint8),)

    def at_rest(self, model_state: PyTree, size: int) -> PyTree:
        """Returns the model's state before a split is read: it has none of its own."""
        del size
        return model_state


class Tokens(Windows):
    """Windows of tokens, each of which stands for several bytes."""

    def example(self, config: Config) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Returns the shape of one sequence; tokens are numbers up to 65,535."""
        return (jax.ShapeDtypeStruct((1, config.data.sequence_length), jnp.uint16),)

    @property
    def units(self) -> dict[str, float]:
        """Bits a token."""
        return {score.TOKEN_BITS.key: float(np.log(2))}

    @property
    def score(self) -> score.Score:
        """The measure by which runs are compared."""
        return score.TOKEN_BITS


Task: TypeAlias = Images | Bytes


def find(config: Config, facts: Facts | None = None) -> Task:
    """Returns the task that the config names, and loads its data.

    Args:
      config: Of the run.
      facts: Of the data, if they are known: then nothing is loaded before it is asked for.

    Raises:
      ValueError: As `check`; if there are too few examples for a batch.
      FileNotFoundError: If the dataset is not there.
    """
    check(config)
    if config.data.name in TEXTS:
        read = functools.cache(functools.partial(TEXTS[config.data.name], config.data.dir))
        if facts is None:
            text.steps_per_epoch(
                len(read().train.tokens), config.batch_size, config.data.sequence_length
            )
        if config.model.name in architectures.CELLS:
            return Bytes(read)
        return Tokens(read) if config.data.name == "tokens" else Windows(read)
    load = functools.cache(functools.partial(_images, config))
    if facts is None:
        found = load()
        batches.steps_per_epoch(found.train.examples, config.batch_size)
        shape = tuple(found.train.image_shape)
        facts = Facts(shape, found.classes, found.maximum, found.mean, found.deviation)
    return Images(facts, load)


def check(config: Config) -> None:
    """Checks that there are such data and such a model, and that they go together; reads nothing.

    Raises:
      ValueError: If there is no dataset or model of that name, or the model is not for it.
    """
    datasets = [*IMAGES, *PHOTOS, f"{TFDS}NAME", *TEXTS]
    for_texts = (*architectures.CELLS, architectures.GPT)
    models = [*architectures.ARCHITECTURES, *for_texts]
    for key, name, existing in (
        ("data", config.data.name, datasets),
        ("model", config.model.name, models),
    ):
        is_tfds = key == "data" and name.startswith(TFDS) and name != TFDS
        if name not in existing and not is_tfds:
            raise ValueError(f"config.{key}.name={name!r}: must be one of {', '.join(existing)}")
    if config.data.standardise and config.data.name not in UNSCALED:
        raise ValueError(
            f"config.data.standardise=True: must be False for {config.data.name}; it is for "
            f"{' and '.join(UNSCALED)}"
        )
    is_text = config.data.name in TEXTS
    fitting = for_texts if is_text else architectures.ARCHITECTURES
    if config.model.name not in fitting:
        raise ValueError(
            f"config.model.name={config.model.name!r}: models for {config.data.name} are "
            f"{', '.join(fitting)}"
        )
    if config.model.name in architectures.TRANSFORMERS and config.mesh.axes != "auto":
        raise ValueError(
            f"config.mesh.axes={config.mesh.axes!r}: transformers are for 'auto' alone"
        )
    if is_text:
        is_recurrent = config.model.name in architectures.CELLS
        for key, value, only, is_meant in (
            ("mesh.axes", config.mesh.axes, "auto", is_recurrent),
            ("model.dtype", config.model.dtype, "float32", is_recurrent),
            ("data.augment", config.data.augment, "none", True),
            ("data.image_size", config.data.image_size, 0, True),
        ):
            if is_meant and value != only:
                of = "recurrent models" if key.startswith("m") else "texts"
                raise ValueError(f"config.{key}={value!r}: {of} are for {only!r} alone")
        if config.data.name == "tokens" and is_recurrent:
            raise ValueError(
                f"config.data.name='tokens': {config.model.name} reads bytes; tokens are for "
                f"{architectures.GPT}"
            )
        return
    if config.data.sequence_length != 0:
        raise ValueError(
            f"config.data.sequence_length={config.data.sequence_length}: images have none: 0"
        )
    if config.data.name in PHOTOS:
        if config.data.image_size == 0:
            raise ValueError(
                f"config.data.image_size=0: photos of {config.data.name} are of many sizes; give "
                "one, as 224"
            )
        _check_photos(config)


def _check_photos(config: Config) -> None:
    if config.data.augment == "pad_crop":
        raise ValueError(
            f"config.data.augment='pad_crop': for {config.data.name} it is none or resized_crop"
        )


def _images(config: Config) -> batches.Dataset:
    """Reads a dataset of images into memory, or opens one of photos in files."""
    if config.data.name in IMAGES:
        whole = IMAGES[config.data.name](config.data.dir, config.data.max_bad_records)
        whole = resize.resized(whole, config.data.image_size)
        return batches.standardised(whole) if config.data.standardise else whole
    load: Callable[[str, int, int, int, float], batches.Dataset]
    if config.data.name.startswith(TFDS):
        load = functools.partial(tfds.load, config.data.name.removeprefix(TFDS))
    else:
        load = PHOTOS[config.data.name]
    whole = load(
        config.data.dir,
        config.data.max_bad_records,
        config.data.image_size,
        config.data.threads,
        config.data.validation,
    )
    if isinstance(whole.train, photos.Photos):
        _check_photos(config)
        return whole
    return resize.resized(whole, config.data.image_size)
