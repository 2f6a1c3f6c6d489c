"""Decodes images, and resizes a part of each.

TurboJPEG (simplejpeg) decodes JPEG, Pillow the other formats that occur among photos (PNG, JPEG in
CMYK), and OpenCV resizes. All three release Python's global lock, so threads run in parallel.
"""

import io
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
import simplejpeg
from PIL import Image

from rigl_optax.data.crops import Window

MAX_PIXELS = 50_000_000  # 150 MB decoded; the largest photo of ImageNet has 30 million

cv2.setNumThreads(0)  # each of our threads decodes whole images


def photo(
    data: bytes,
    choose: Callable[[int, int], Window],
    out: np.ndarray,
    *,
    flip: bool = False,
) -> None:
    """Decodes an image and resizes a part of it bicubically.

    Where the part is at least twice as large as `out` in both directions, the JPEG is decoded at a
    half, a quarter or an eighth of its size, which costs less. Of 16-bit pixels the upper eight
    bits are taken.

    Args:
      data: The encoded image: JPEG or PNG.
      choose: `choose(height, width) -> window`, the part to cut out, in pixels.
      out: uint8 (size, size, 3), overwritten with RGB.
      flip: Whether to mirror the part left and right.

    Raises:
      ValueError: If the image is neither JPEG nor PNG, is damaged or cut off, or has more than
        50 million pixels.
    """
    size = out.shape[0]
    shape = _plain_jpeg(data)
    if shape is None:
        pixels = _by_pillow(data, "RGB")
        part = choose(*pixels.shape[:2])
    else:
        part = choose(*shape)
        divisor = _divisor(min(part.height, part.width) // size)
        pixels = _by_turbojpeg(data, shape, divisor)
        part = _scaled(part, divisor, *pixels.shape[:2])
    top, left, height, width = part
    view = pixels[top : top + height, left : left + width]
    if not flip:
        cv2.resize(view, (size, size), dst=out, interpolation=cv2.INTER_CUBIC)
    else:
        cv2.flip(cv2.resize(view, (size, size), interpolation=cv2.INTER_CUBIC), 1, dst=out)


def stored(data: bytes) -> np.ndarray:
    """Decodes a whole image.

    Args:
      data: The encoded image: JPEG or PNG.

    Returns:
      uint8 (height, width) if the image is grey, else (height, width, 3).

    Raises:
      ValueError: As `photo`.
    """
    return _by_pillow(data, None)


def _plain_jpeg(data: bytes) -> tuple[int, int] | None:
    """Returns height and width if TurboJPEG can decode the image to RGB, else None."""
    if data[:2] != b"\xff\xd8":
        return None
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None  # Pillow reads more kinds of JPEG, and otherwise says what is wrong
    if colorspace not in ("Gray", "YCbCr", "RGB"):
        return None
    _check_size(height, width)
    return height, width


def _by_turbojpeg(data: bytes, shape: tuple[int, int], divisor: int) -> np.ndarray:
    # Repeats colours stored at half resolution instead of interpolating them: 5 % faster, and
    # everything is resized afterwards in any case.
    keys: dict[str, Any] = {"fastupsample": True}
    if divisor > 1:
        height, width = shape
        keys |= {
            "min_factor": divisor,
            "min_height": height // divisor,
            "min_width": width // divisor,
        }
    try:
        return simplejpeg.decode_jpeg(data, **keys)
    except ValueError as error:
        # Some photos of ImageNet have extra bytes after their last pixel.
        if "extraneous bytes" not in str(error):
            raise ValueError(f"a damaged JPEG image ({error})") from error
    return simplejpeg.decode_jpeg(data, strict=False, **keys)


def _by_pillow(data: bytes, mode: str | None) -> np.ndarray:
    try:
        with Image.open(io.BytesIO(data), formats=["PNG", "JPEG"]) as image:
            _check_size(image.height, image.width)
            eight: Image.Image = image
            if image.mode.startswith("I"):  # 16-bit grey, which `convert` would clip to 255
                eight = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            return np.asarray(eight.convert(mode or ("L" if eight.mode == "L" else "RGB")))
    except _TooLargeError:
        raise
    except Exception as error:  # Pillow's decoders fail in many ways on damaged files
        raise ValueError(f"not a PNG or JPEG image, or a damaged one ({error})") from error


class _TooLargeError(ValueError):
    pass


def _check_size(height: int, width: int) -> None:
    if not 0 < height * width <= MAX_PIXELS:
        raise _TooLargeError(
            f"an image of {height} x {width} pixels; at most {MAX_PIXELS:,} are read"
        )


def _divisor(ratio: int) -> int:
    """Returns the divisor of the decoded size for a part `ratio` times as large as needed."""
    return next((divisor for divisor in (8, 4, 2) if ratio >= divisor), 1)


def _scaled(part: Window, divisor: int, height: int, width: int) -> Window:
    """Converts a window to the coordinates of an image decoded at 1/`divisor` of its size.

    Args:
      part: The window in the full image.
      divisor: 1, 2, 4 or 8.
      height: Height of the decoded image. JPEG rounds it up, so its last row may stand for pixels
        beyond the full image; likewise `width`.
      width: Width of the decoded image.

    Returns:
      The window in the decoded image.
    """

    def along(start: int, length: int, size: int) -> tuple[int, int]:
        length = min(max(1, round(length / divisor)), size)
        return min(round(start / divisor), size - length), length

    top, rows = along(part.top, part.height, height)
    left, columns = along(part.left, part.width, width)
    return Window(top, left, rows, columns)
