"""What a dataset is, and which of its examples make up a batch.

A training batch is a pure function of (seed, step): a run that is stopped and
started again needs to remember nothing about its data but the step, and every
host of a larger run can work out its own part.
"""

import functools
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Batch = dict[str, np.ndarray]


class Split(NamedTuple):
    """Images uint8 (examples, ...) and labels int32 (examples,), both on the host."""

    images: np.ndarray
    labels: np.ndarray


class Dataset(NamedTuple):
    """Three disjoint splits and how to read a pixel.

    `maximum` is the pixel value that stands for 1.0: images stay uint8 on the host
    and become float32 in [0, 1] on the device (`to_float`). `left_out` says which records
    of the files could not be read, and why.
    """

    train: Split
    validation: Split
    test: Split
    classes: int
    maximum: float
    left_out: tuple[str, ...] = ()


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
    split: Split, batch_size: int, *, seed: int, step: int, rows: np.ndarray | None = None
) -> Batch:
    """The batch of one training step: `images` uint8 (batch, ...), `labels` int32 (batch,).

    Args:
      split: All examples.
      batch_size: Of the whole batch, over all hosts.
      seed: The data seed.
      step: Training step, from 0.
      rows: int64 (part,): which examples of the batch this host is to have; None for all. The
        whole batch does not depend on how many hosts share it.
    """
    chosen = batch_indices(len(split.labels), batch_size, seed=seed, step=step)
    if rows is not None:
        chosen = chosen[rows]
    return {"images": split.images[chosen], "labels": split.labels[chosen]}


def evaluation_batches(
    split: Split, batch_size: int, rows: np.ndarray | None = None
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
    for start in range(0, len(split.labels), batch_size):
        chosen = every[start + every < len(split.labels)] + start
        missing = len(every) - len(chosen)
        images = split.images[chosen]
        yield {
            "images": np.pad(images, [(0, missing)] + [(0, 0)] * (images.ndim - 1)),
            "labels": np.pad(split.labels[chosen], (0, missing)),
            "weights": np.pad(np.ones(len(chosen), np.float32), (0, missing)),
        }


@functools.lru_cache(maxsize=4)
def _permutation(examples: int, seed: int, epoch: int) -> np.ndarray:
    key = np.array([seed, epoch], np.uint64)
    order = np.random.Generator(np.random.Philox(key=key)).permutation(examples)
    order.flags.writeable = False  # shared by the cache
    return order
