"""What a dataset is, and which of its examples make up a batch.

A training batch is a pure function of (seed, step): a run that is stopped and
started again needs to remember nothing about its data but the step, and every
host of a larger run can work out its own part.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from rigl_optax.data import augmentation

Batch: TypeAlias = dict[str, np.ndarray]


class Place(NamedTuple):
    """Which part of which batch: what is drawn for its images follows from it.

    Attributes:
      batch_size: Of the whole batch, over all hosts.
      seed: The data seed.
      step: Training step, from 0.
      rows: int64 (part,): which examples of the batch; None for all.
    """

    batch_size: int
    seed: int
    step: int
    rows: np.ndarray | None = None


class Examples(Protocol):
    """A split: images in memory (`Split`), or in files until they are needed (`photos.Photos`)."""

    @property
    def examples(self) -> int:
        """How many there are."""

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Shape of one image."""

    def training(self, indices: np.ndarray, augment: str, place: Place) -> Batch:
        """`images` uint8 (part, ...) and `labels` int32 (part,), augmented.

        Args:
          indices: (part,), of the examples.
          augment: As in a config.
          place: What they are in.
        """

    def evaluation(self, indices: np.ndarray) -> Batch:
        """The same, not augmented, with `weights` float32 (part,): 0 for what cannot be read."""


class Split(NamedTuple):
    """Images uint8 (examples, ...) and labels int32 (examples,), both on the host.

    `standardised` says that each image is to have mean 0 and deviation 1; batches then hold its
    `mean` and `deviation`, which are those of the whole image, whatever part of it is looked at.
    """

    images: np.ndarray
    labels: np.ndarray
    standardised: bool = False

    @property
    def examples(self) -> int:
        """How many there are."""
        return len(self.labels)

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Shape of one image."""
        return self.images.shape[1:]

    def training(self, indices: np.ndarray, augment: str, place: Place) -> Batch:
        """See `Examples`."""
        batch = self._batch(indices)
        batch["images"] = augmentation.augmented(batch["images"], augment, *place)
        return batch

    def evaluation(self, indices: np.ndarray) -> Batch:
        """See `Examples`."""
        return self._batch(indices) | {"weights": np.ones(len(indices), np.float32)}

    def _batch(self, indices: np.ndarray) -> Batch:
        images = self.images[indices]
        batch = {"images": images, "labels": self.labels[indices]}
        if self.standardised:
            flat = images.reshape(len(images), -1)
            # A constant image is divided by 1 / sqrt(pixels), as TensorFlow does.
            least = 255.0 / np.sqrt(flat.shape[1])
            batch["mean"] = flat.mean(1, np.float64).astype(np.float32)
            batch["deviation"] = np.maximum(flat.std(1, np.float64), least).astype(np.float32)
        return batch


class Dataset(NamedTuple):
    """Three disjoint splits and how to read a pixel.

    `maximum` is the pixel value that stands for 1.0: images stay uint8 on the host
    and become float32 on the device (`normalised`): in [0, 1], or, where `mean` and `deviation` of
    the channels are given, these are subtracted and divided by. `left_out` says which records
    of the files could not be read so far, and why.
    """

    train: Any
    validation: Any
    test: Any
    classes: int
    maximum: float
    left_out: Callable[[], tuple[str, ...]] = tuple
    mean: tuple[float, ...] = ()
    deviation: tuple[float, ...] = ()


def normalised(batch: dict[str, Any], dataset: Any) -> jax.Array:
    """The images of a batch as float32 numbers, same shape; runs on the device."""
    if "mean" in batch:
        over = (-1, *[1] * (batch["images"].ndim - 1))
        mean, deviation = (batch[key].reshape(over) for key in ("mean", "deviation"))
        return (batch["images"].astype(jnp.float32) - mean) / deviation
    images = to_float(batch["images"], dataset.maximum)
    if not dataset.mean:
        return images
    return (images - jnp.float32(dataset.mean)) / jnp.float32(dataset.deviation)


def to_float(images: jax.Array, maximum: float) -> jax.Array:
    """Float32 images in [0, 1] from integer ones, same shape; runs on the device."""
    return images.astype(jnp.float32) / jnp.float32(maximum)


def steps_per_epoch(examples: int, batch_size: int) -> int:
    """Full batches in an epoch; what is left over is in another epoch's batches."""
    if not 1 <= batch_size <= examples:
        raise ValueError(f"batch_size={batch_size}: must be from 1 to {examples}, the examples")
    return examples // batch_size


def batch_indices(examples: int, batch_size: int, *, seed: int, step: int) -> np.ndarray:
    """Which examples make up the batch of this step: int64 (batch_size,).

    An epoch is a permutation of the examples drawn from a counter-based generator
    whose key is (seed, epoch); no generator state is carried from step to step.

    Args:
      examples: Number of examples in the split.
      batch_size: Examples in a batch; an incomplete last batch is left out.
      seed: The data seed, from 0 to 2**64 - 1.
      step: Training step, from 0.

    Returns:
      Indices into the split.

    Example:
      >>> epoch = [batch_indices(10, 5, seed=0, step=step) for step in (2, 3)]
      >>> sorted(np.concatenate(epoch).tolist())
      [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    """
    epoch, position = divmod(step, steps_per_epoch(examples, batch_size))
    start = position * batch_size
    return _permutation(examples, seed, epoch)[start : start + batch_size]


def training_batch(
    split: Examples,
    batch_size: int,
    *,
    seed: int,
    step: int,
    rows: np.ndarray | None = None,
    augment: str = "none",
) -> Batch:
    """The batch of one training step: `images` uint8 (batch, ...), `labels` int32 (batch,).

    Args:
      split: All examples.
      batch_size: Of the whole batch, over all hosts.
      seed: The data seed.
      step: Training step, from 0.
      rows: int64 (part,): which examples of the batch this host is to have; None for all. The
        whole batch does not depend on how many hosts share it.
      augment: How images are augmented, as in a config.
    """
    chosen = batch_indices(split.examples, batch_size, seed=seed, step=step)
    if rows is not None:
        chosen = chosen[rows]
    return split.training(chosen, augment, Place(batch_size, seed, step, rows))


def evaluation_batches(
    split: Examples, batch_size: int, rows: np.ndarray | None = None
) -> Iterator[Batch]:
    """All examples in order, in batches of one shape.

    The last batch is filled up with examples of weight 0, so that every example
    counts exactly once and the compiled function sees a single shape.

    Args:
      split: All examples.
      batch_size: Of a whole batch, over all hosts.
      rows: int64 (part,): which examples of each batch this host is to have; None for all.

    Yields:
      `images` uint8 (batch, ...), `labels` int32 (batch,), `weights` float32 (batch,).
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: must be at least 1")
    every = np.arange(batch_size) if rows is None else rows
    for start in range(0, split.examples, batch_size):
        chosen = every[start + every < split.examples] + start
        missing = len(every) - len(chosen)
        found = split.evaluation(chosen)
        if missing:
            found = {
                # What is divided by must not be 0: 0 / 0 with a weight of 0 is not 0.
                key: np.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1), constant_values=fill)
                for key, x in found.items()
                for fill in [1 if key == "deviation" else 0]
            }
        yield found


@functools.lru_cache(maxsize=4)
def _permutation(examples: int, seed: int, epoch: int) -> np.ndarray:
    key = np.array([seed, epoch], np.uint64)
    order = np.random.Generator(np.random.Philox(key=key)).permutation(examples)
    order.flags.writeable = False  # shared by the cache
    return order
