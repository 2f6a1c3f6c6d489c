"""Random crops and flips of training images that are in memory.

The random numbers of an image are a function of (seed, step, row in the batch): every host can
augment its own part, and a resumed run sees the same images.
"""

import numpy as np

PAD = 4  # pixels mirrored on each side (CIFAR recipe)
AREA = (0.08, 1.0)  # fraction of the image that a random crop keeps (ImageNet recipe)
ASPECT = (3 / 4, 4 / 3)  # width / height of that crop
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
    bits = np.random.Philox(key=np.array([seed, step], np.uint64))
    bits.advance(_STREAM)
    draws = np.random.Generator(bits).random((batch_size, 5))
    draws = draws if rows is None else draws[rows]
    moved = _pad_crop(images, draws) if augment == "pad_crop" else _resized_crop(images, draws)
    flips = draws[:, 4] < 0.5
    moved[flips] = moved[flips, :, ::-1]
    return moved


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
    """Cuts a part of random area and aspect ratio and resizes it to the size of the image."""
    height, width = images.shape[1:3]
    area = AREA[0] + draws[:, 2] * (AREA[1] - AREA[0])
    ratio = np.exp(np.log(ASPECT[0]) + draws[:, 3] * np.log(ASPECT[1] / ASPECT[0]))
    high = np.minimum(1.0, np.sqrt(area / ratio)) * height
    wide = np.minimum(1.0, np.sqrt(area * ratio)) * width
    y = _sample_positions(draws[:, 0] * (height - high), high, height)
    x = _sample_positions(draws[:, 1] * (width - wide), wide, width)
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
