"""Defines a dataset of images, and picks the examples of each batch.

A training batch is a pure function of (seed, step): a run that is stopped and
started again needs to remember nothing about its data but the step, and every
host of a larger run can compute its own part.
"""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from rigl_optax.data import augmentation

Batch: TypeAlias = dict[str, np.ndarray]


class BatchPart(NamedTuple):
    """Identifies the part of a training batch that one host makes.

    It is the key of the random numbers that augment the images of that part.

    Attributes:
      batch_size: Number of examples in the whole batch, over all hosts.
      seed: Data seed.
      step: Training step, from 0.
      rows: int64 (part,), the rows of the whole batch in this part; None for all.
    """

    batch_size: int
    seed: int
    step: int
    rows: np.ndarray | None = None


class Examples(Protocol):
    """A split: images in memory (`Split`), or in files until they are needed (`photos.Photos`)."""

    @property
    def examples(self) -> int:
        """Number of examples."""

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Shape of one image."""

    def training(self, indices: np.ndarray, augment: str, part: BatchPart) -> Batch:
        """Returns augmented `images` uint8 (part, ...) and their `labels` int32 (part,).

        Args:
          indices: int64 (part,), indices of the examples in the split.
          augment: `config.data.augment`.
          part: The part of the batch that the examples are; keys the augmentation.
        """

    def evaluation(self, indices: np.ndarray) -> Batch:
        """Returns the examples without augmentation.

        Args:
          indices: int64 (part,), indices of the examples in the split.

        Returns:
          `images`, `labels`, and `weights` float32 (part,), 0 for a record that cannot be read.
        """


class Split(NamedTuple):
    """A split in memory, on the host.

    Attributes:
      images: uint8 (examples, ...).
      labels: int32 (examples,).
      standardised: Whether each image is to be scaled to mean 0 and deviation 1. Batches then
        also hold its `mean` and `deviation`, computed before augmentation.
    """

    images: np.ndarray
    labels: np.ndarray
    standardised: bool = False

    @property
    def examples(self) -> int:
        """Number of examples."""
        return len(self.labels)

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Shape of one image."""
        return self.images.shape[1:]

    def training(self, indices: np.ndarray, augment: str, part: BatchPart) -> Batch:
        """Returns augmented examples; see `Examples`."""
        batch = self._batch(indices)
        batch["images"] = augmentation.augmented(batch["images"], augment, *part)
        return batch

    def evaluation(self, indices: np.ndarray) -> Batch:
        """Returns examples as they are, all of weight 1; see `Examples`."""
        return self._batch(indices) | {"weights": np.ones(len(indices), np.float32)}

    def _batch(self, indices: np.ndarray) -> Batch:
        images = self.images[indices]
        batch = {"images": images, "labels": self.labels[indices]}
        if self.standardised:
            flat = images.reshape(len(images), -1)
            # As `tf.image.per_image_standardization`: the bound keeps a constant image finite.
            lower_bound = 255.0 / np.sqrt(flat.shape[1])
            deviation = np.maximum(flat.std(1, np.float64), lower_bound)
            batch["mean"] = flat.mean(1, np.float64).astype(np.float32)
            batch["deviation"] = deviation.astype(np.float32)
        return batch


class Dataset(NamedTuple):
    """Three disjoint splits, and how pixels become floating-point numbers.

    Images stay uint8 on the host and become float32 on the device (`normalised`).

    Attributes:
      train: `Examples`.
      validation: `Examples`.
      test: `Examples`.
      classes: Number of classes; labels are 0 to `classes - 1`.
      maximum: Pixel value that becomes 1.0.
      bad_records: Returns a line for each record that could not be read so far, with the reason.
      mean: Mean of each channel in [0, 1], or one number for all, which is subtracted; empty:
        nothing is.
      deviation: Standard deviation of each channel, by which the difference is divided.
    """

    train: Any
    validation: Any
    test: Any
    classes: int
    maximum: float
    bad_records: Callable[[], tuple[str, ...]] = tuple
    mean: tuple[float, ...] = ()
    deviation: tuple[float, ...] = ()


def standardised(dataset: Dataset) -> Dataset:
    """Returns the dataset with the mean and deviation of all pixels of its training split.

    Images are then scaled to mean 0 and deviation 1 over the split, not each by itself.

    Args:
      dataset: Its training split is a `Split`, in memory.
    """
    pixels = dataset.train.images
    # Sums of integers are exact: the same numbers on every machine.
    total, count = int(pixels.sum(dtype=np.int64)), pixels.size
    squares = sum(int((part.astype(np.int64) ** 2).sum()) for part in np.array_split(pixels, 16))
    mean = total / count / dataset.maximum
    deviation = math.sqrt(squares * count - total**2) / count / dataset.maximum
    return dataset._replace(mean=(mean,), deviation=(deviation,))


def normalised(batch: dict[str, Any], dataset: Any) -> jax.Array:
    """Scales the images of a batch as their dataset asks; runs on the device.

    Args:
      batch: With `images` uint8 (part, ...), and `mean` and `deviation` float32 (part,) where
        each image is standardised by itself.
      dataset: What has the `maximum`, `mean` and `deviation` of the dataset.

    Returns:
      float32, of the shape of the images.
    """
    if "mean" in batch:
        over = (-1, *[1] * (batch["images"].ndim - 1))
        mean, deviation = (batch[key].reshape(over) for key in ("mean", "deviation"))
        return (batch["images"].astype(jnp.float32) - mean) / deviation
    images = to_float(batch["images"], dataset.maximum)
    if not dataset.mean:
        return images
    return (images - jnp.float32(dataset.mean)) / jnp.float32(dataset.deviation)


def to_float(images: jax.Array, maximum: float) -> jax.Array:
    """Scales integer images to float32 in [0, 1], same shape; runs on the device."""
    return images.astype(jnp.float32) / jnp.float32(maximum)


def steps_per_epoch(examples: int, batch_size: int) -> int:
    """Returns the number of full batches in an epoch; the rest of the examples is left out.

    Raises:
      ValueError: If the batch size is not between 1 and the number of examples.
    """
    if not 1 <= batch_size <= examples:
        raise ValueError(f"batch_size={batch_size}: must be from 1 to {examples}, the examples")
    return examples // batch_size


def batch_indices(examples: int, batch_size: int, *, seed: int, step: int) -> np.ndarray:
    """Picks the examples of a training step.

    An epoch is a permutation of the examples drawn from a counter-based generator
    whose key is (seed, epoch); no generator state is carried from step to step.

    Args:
      examples: Number of examples in the split.
      batch_size: Examples in a batch; an incomplete last batch is left out.
      seed: Data seed, from 0 to 2**64 - 1.
      step: Training step, from 0.

    Returns:
      int64 (batch_size,), indices into the split.

    Examples:
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
    """Makes the batch of one training step, or one host's part of it.

    Args:
      split: The training split.
      batch_size: Number of examples in the whole batch, over all hosts.
      seed: Data seed.
      step: Training step, from 0.
      rows: int64 (part,), the rows of the batch that this host makes; None for all. The whole
        batch does not depend on how many hosts share it.
      augment: `config.data.augment`.

    Returns:
      `images` uint8 (part, ...) and `labels` int32 (part,).
    """
    chosen = batch_indices(split.examples, batch_size, seed=seed, step=step)
    if rows is not None:
        chosen = chosen[rows]
    return split.training(chosen, augment, BatchPart(batch_size, seed, step, rows))


def evaluation_batches(
    split: Examples, batch_size: int, rows: np.ndarray | None = None
) -> Iterator[Batch]:
    """Makes batches of one shape from all examples in order.

    The last batch is filled up with examples of weight 0, so that every example
    counts exactly once and the compiled function sees a single shape.

    Args:
      split: The split to evaluate on.
      batch_size: Number of examples in a whole batch, over all hosts.
      rows: int64 (part,), the rows of each batch that this host makes; None for all.

    Yields:
      `images` uint8 (part, ...), `labels` int32 (part,), `weights` float32 (part,).

    Raises:
      ValueError: If the batch size is less than 1.
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
                # Images are divided by `deviation`: 0 / 0 is NaN, which a weight of 0 keeps.
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
