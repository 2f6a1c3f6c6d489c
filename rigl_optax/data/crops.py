"""Chooses the part of a photo that is seen, from its size and from random numbers.

The numbers are uniform in [0, 1), `DRAWS` of them for each example of a batch, from a counter-based
generator keyed by (seed, step): the same on every host, and after every restart.
"""

import math
from typing import NamedTuple

import numpy as np

# Fraction of the image. The reference code passes area_range=(0.08, 1.0), but with a
# min_object_covered=0.1 of the whole image, which makes 0.1 the smallest area.
AREA = (0.1, 1.0)
ASPECT = (3 / 4, 4 / 3)  # width / height
ATTEMPTS = 10
MARGIN = 32  # the central crop is size / (size + MARGIN) of the short side
# Aspect ratio and height of each attempt; then vertical position, horizontal position, flip.
DRAWS = 2 * ATTEMPTS + 3

# Start in Philox's 256-bit counter: `batches` draws the order of examples from its beginning.
_AUGMENTATION = 1 << 192


class Window(NamedTuple):
    """A rectangle in an image, in pixels."""

    top: int
    left: int
    height: int
    width: int


def draws(batch_size: int, seed: int, step: int, rows: np.ndarray | None = None) -> np.ndarray:
    """Draws the random numbers that augment the images of a training batch.

    Args:
      batch_size: Number of examples in the whole batch.
      seed: Data seed.
      step: Training step, from 0.
      rows: int64 (part,), the rows of the batch to draw for; None for all.

    Returns:
      float64 (part, DRAWS), uniform in [0, 1).
    """
    key = np.array([seed, step], np.uint64)
    generator = np.random.Generator(np.random.Philox(key=key, counter=_AUGMENTATION))
    drawn = generator.random((batch_size, DRAWS))
    return drawn if rows is None else drawn[rows]


def is_flipped(drawn: np.ndarray) -> np.ndarray:
    """Returns bools (...): whether to mirror left and right, from numbers (..., DRAWS)."""
    return drawn[..., -1] < 0.5


def resized_crop(height: int, width: int, size: int, drawn: np.ndarray) -> Window:
    """Chooses a random part of a photo, or its central crop where `random_part` gives none.

    Args:
      height: Height of the photo in pixels.
      width: Width of the photo in pixels.
      size: Side of the square that the part is resized to; used for the central crop only.
      drawn: (DRAWS,), uniform in [0, 1).

    Returns:
      The part, in pixels of the image.
    """
    return random_part(height, width, drawn) or central_crop(height, width, size)


def random_part(height: int, width: int, drawn: np.ndarray) -> Window | None:
    """Draws a random part of an image: 10 to 100 % of its area, aspect ratio 3/4 to 4/3.

    It is distributed as `tf.image.sample_distorted_bounding_box` with the reference's arguments:
    the aspect ratio is uniform, then the height is uniform among the possible ones.

    Args:
      height: Height of the image, in pixels.
      width: Width of the image, in pixels.
      drawn: Numbers from `draws`, (DRAWS,).

    Returns:
      The part; None if ten attempts give none, or the part is the whole image.
    """
    for attempt in range(ATTEMPTS):
        aspect = ASPECT[0] + (ASPECT[1] - ASPECT[0]) * float(drawn[2 * attempt])
        found = _with_aspect(height, width, aspect, float(drawn[2 * attempt + 1]))
        if found == (height, width):
            return None
        if found is not None:
            h, w = found
            # Like TensorFlow's op, this never picks the last of several positions.
            top = int(float(drawn[-3]) * max(height - h, 1))
            left = int(float(drawn[-2]) * max(width - w, 1))
            return Window(top, left, h, w)
    return None


def central_crop(height: int, width: int, size: int) -> Window:
    """Returns the central square, size / (size + 32) of the image's short side (224/256)."""
    side = max(1, int(size / (size + MARGIN) * min(height, width)))
    return Window((height - side + 1) // 2, (width - side + 1) // 2, side, side)


def _with_aspect(height: int, width: int, aspect: float, drawn: float) -> tuple[int, int] | None:
    """Draws a height and width of this aspect ratio with an area in range; None if none fits."""
    area = height * width
    least, most = AREA[0] * area, AREA[1] * area
    low = round(math.sqrt(least / aspect))
    high = min(round(math.sqrt(most / aspect)), height)
    while round(high * aspect) > width:
        high -= 1
    low = min(low, high)
    h = low + int(drawn * (high - low + 1))
    # Rounding may have moved the area out of range.
    if h * round(h * aspect) < least:
        h += 1
    if h * round(h * aspect) > most:
        h -= 1
    w = round(h * aspect)
    if not least <= h * w <= most or h > height or w > width or h < 1 or w < 1:
        return None
    return h, w
