"""Cuts labelled pieces out of the two photographs in scikit-learn's wheel, for tests too."""

import functools
import io
from collections.abc import Iterator

import numpy as np
import simplejpeg
from PIL import Image
from sklearn import datasets

CLASSES = 4  # left and right halves of a Chinese palace, and of a flower


@functools.cache
def photographs() -> list[np.ndarray]:
    """Loads the two photographs: uint8 (height, width, 3)."""
    return [np.ascontiguousarray(image) for image in datasets.load_sample_images().images]


def pieces(count, seed, smallest=120, largest=280) -> Iterator[tuple[np.ndarray, int]]:
    """Yields uint8 images of many sizes, and labels 0 to 3 in turn."""
    generator = np.random.default_rng(seed)
    for i in range(count):
        image = photographs()[i % 4 // 2]
        half = image[:, : image.shape[1] // 2] if i % 2 else image[:, image.shape[1] // 2 :]
        height, width = generator.integers(smallest, largest, 2)
        top = generator.integers(half.shape[0] - height + 1)
        left = generator.integers(half.shape[1] - width + 1)
        yield np.ascontiguousarray(half[top : top + height, left : left + width]), i % 4


def jpegs(count, seed=0, quality=90, **sizes) -> list[tuple[bytes, int]]:
    """Encodes pieces as JPEG files, with their labels."""
    return [
        (simplejpeg.encode_jpeg(image, quality=quality, colorsubsampling="420"), label)
        for image, label in pieces(count, seed, **sizes)
    ]


def png(image) -> bytes:
    """Encodes an image as a PNG file."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


def small(count, size, seed=0) -> tuple[np.ndarray, np.ndarray]:
    """Resizes pieces to the size of CIFAR's images: uint8 (count, size, size, 3), and labels."""
    found = list(pieces(count, seed))
    images = [np.asarray(Image.fromarray(image).resize((size, size))) for image, _ in found]
    return np.stack(images), np.array([label for _, label in found], np.int32)
