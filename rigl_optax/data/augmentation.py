"""Images of another size, and training images that are never twice the same.

What is drawn for an image is a function of (seed, step, its place in the batch): every host can
augment its own part, and a run that is resumed sees what it would have seen.
"""

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from rigl_optax.data import crops

if TYPE_CHECKING:  # which apply it, and so import this module
    from rigl_optax.data import batches

PAD = 4  # pixels on each side, mirrored: the CIFAR recipe
_STREAM = 0x6175676D  # keeps the draws of `pad_crop` apart from the order of the data


def resized(dataset: "batches.Dataset", size: int) -> "batches.Dataset":
    """The same images with `size` pixels a side, resized once, bilinearly; all of it if 0."""
    shape = dataset.train.images.shape[1:3]
    if not size or shape == (size, size):
        return dataset
    train, validation, test = (
        split._replace(images=_resize(split.images, size))
        for split in (dataset.train, dataset.validation, dataset.test)
    )
    return dataset._replace(train=train, validation=validation, test=test)


def augmented(
    images: np.ndarray,
    augment: str,
    batch_size: int,
    seed: int,
    step: int,
    rows: np.ndarray | None = None,
) -> np.ndarray:
    """Augments the training images of a step: uint8, the same shape.

    Args:
      images: uint8 (part, height, width, ...).
      augment: As `config.data.augment`.
      batch_size: Size of the whole batch.
      seed: The data seed.
      step: Training step, from 0.
      rows: int64 (part,): which examples of the batch these are; None for all.
    """
    if augment == "none":
        return images
    if augment == "pad_crop":
        draws = _draws(batch_size, seed, step, rows)
        moved, flips = _pad_crop(images, draws), draws[:, 4] < 0.5
    else:
        draws = crops.draws(batch_size, seed, step, rows)
        moved, flips = _resized_crop(images, draws), crops.is_flipped(draws)
    moved[flips] = moved[flips, :, ::-1]
    return moved


def _draws(batch_size: int, seed: int, step: int, rows: np.ndarray | None) -> np.ndarray:
    """Draws five numbers in [0, 1) for each image of `pad_crop`."""
    bits = np.random.Philox(key=np.array([seed, step], np.uint64))
    bits.advance(_STREAM)
    drawn = np.random.Generator(bits).random((batch_size, 5))
    return drawn if rows is None else drawn[rows]


def _pad_crop(images: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """A crop of the size of the image from the image with a mirrored border, edge included."""
    count, height, width = images.shape[:3]
    border = [(0, 0), (PAD, PAD), (PAD, PAD)] + [(0, 0)] * (images.ndim - 3)
    padded = np.pad(images, border, mode="symmetric")
    tops, lefts = (draws[:, :2] * (2 * PAD + 1)).astype(np.int64).T
    rows = tops[:, None] + np.arange(height)
    columns = lefts[:, None] + np.arange(width)
    return padded[np.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]]


def _resized_crop(images: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """Resizes a random part of each image bilinearly to the size of the image.

    The whole image stands where no part is drawn: it is also shown in evaluations.
    """
    height, width = images.shape[1:3]
    whole = crops.Window(0, 0, height, width)
    windows = [crops.random_part(height, width, drawn) or whole for drawn in draws]
    top, left, high, wide = np.array(windows, np.float64).T
    y, x = _places(top, high, height), _places(left, wide, width)
    found = _between(_between(images.astype(np.float32), y, 1), x, 2)
    return np.rint(found).astype(images.dtype)


def _places(start: np.ndarray, length: np.ndarray, size: int) -> np.ndarray:
    """Where the centres of the new pixels lie among those of the old: (images, size)."""
    centres = start[:, None] + (np.arange(size) + 0.5) / size * length[:, None] - 0.5
    return np.clip(centres, 0, size - 1)


def _between(images: np.ndarray, places: np.ndarray, axis: int) -> np.ndarray:
    """Values of each image at places along an axis, linear between its pixels."""
    low = places.astype(np.int64)
    shape = [len(images), *[1] * (images.ndim - 1)]
    shape[axis] = -1
    high = np.minimum(low + 1, images.shape[axis] - 1)
    part = (places - low).astype(np.float32).reshape(shape)
    before, after = (np.take_along_axis(images, i.reshape(shape), axis) for i in (low, high))
    return before * (1 - part) + after * part


def _resize(images: np.ndarray, size: int) -> np.ndarray:
    @jax.jit
    def resize(part: jax.Array) -> jax.Array:
        shape = (len(part), size, size, *images.shape[3:])
        found = jax.image.resize(part.astype(jnp.float32), shape, "linear")
        return jnp.rint(found).astype(images.dtype)

    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        parts = [
            np.asarray(resize(part)) for part in np.array_split(images, -(-len(images) // 5000))
        ]
    return np.concatenate(parts)
