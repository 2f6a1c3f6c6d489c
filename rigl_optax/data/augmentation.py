"""Random crops and flips of training images that are in memory.

The random numbers of an image are a function of (seed, step, row in the batch): every host can
augment its own part, and a resumed run sees the same images.
"""

import numpy as np

from rigl_optax.data import crops

PAD = 4  # pixels mirrored on each side (CIFAR recipe)
# Offset in the Philox stream: `batches` draws the order of the data from its beginning.
_STREAM = 0x6175676D


def augmented(
    images: np.ndarray,
    augment: str,
    batch_size: int,
    seed: int,
    step: int,
    rows: np.ndarray | None = None,
) -> np.ndarray:
    """Crops and flips the images of one training step.

    Args:
      images: uint8 (part, height, width, ...).
      augment: `config.data.augment`: "none", "pad_crop" (CIFAR) or "resized_crop" (ImageNet).
      batch_size: Number of examples in the whole batch, over all hosts.
      seed: Data seed.
      step: Training step, from 0.
      rows: int64 (part,), the rows of the batch that `images` are; None for all.

    Returns:
      uint8 (part, height, width, ...).
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
    """Mirrors a border of `PAD` pixels and cuts a random part of the original size."""
    count, height, width = images.shape[:3]
    border = [(0, 0), (PAD, PAD), (PAD, PAD)] + [(0, 0)] * (images.ndim - 3)
    padded = np.pad(images, border, mode="symmetric")
    tops, lefts = (draws[:, :2] * (2 * PAD + 1)).astype(np.int64).T
    rows = tops[:, None] + np.arange(height)
    columns = lefts[:, None] + np.arange(width)
    return padded[np.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]]


def _resized_crop(images: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """Resizes a random part of each image bilinearly to the size of the image.

    Where no part is drawn it is the whole image, which is also what evaluations show.
    """
    height, width = images.shape[1:3]
    whole = crops.Window(0, 0, height, width)
    windows = [crops.random_part(height, width, drawn) or whole for drawn in draws]
    top, left, high, wide = np.array(windows, np.float64).T
    y, x = _sample_positions(top, high, height), _sample_positions(left, wide, width)
    found = _interpolate(_interpolate(images.astype(np.float32), y, 1), x, 2)
    return np.rint(found).astype(images.dtype)


def _sample_positions(start: np.ndarray, length: np.ndarray, size: int) -> np.ndarray:
    """Returns where the centres of the new pixels lie in the old image: (images, size)."""
    centres = start[:, None] + (np.arange(size) + 0.5) / size * length[:, None] - 0.5
    return np.clip(centres, 0, size - 1)


def _interpolate(images: np.ndarray, positions: np.ndarray, axis: int) -> np.ndarray:
    """Interpolates each image linearly at `positions` (images, size) along an axis."""
    low = positions.astype(np.int64)
    shape = [len(images), *[1] * (images.ndim - 1)]
    shape[axis] = -1
    high = np.minimum(low + 1, images.shape[axis] - 1)
    part = (positions - low).astype(np.float32).reshape(shape)
    before, after = (np.take_along_axis(images, i.reshape(shape), axis) for i in (low, high))
    return before * (1 - part) + after * part
