"""Counts the live connections of input pixels, where a layer has one row for each of them."""

import math

import numpy as np

from rigl_optax import analysis


def reads_pixels(mask: np.ndarray, image_shape: tuple[int, ...]) -> bool:
    """Tells whether a layer has one row of weights for each value of an image."""
    return mask.ndim == 2 and len(mask) == math.prod(image_shape)


def connections(mask: np.ndarray, image_shape: tuple[int, ...]) -> np.ndarray:
    """Counts the active weights of each pixel, over its channels: int (height, width)."""
    return np.asarray(analysis.fan_out(mask)).reshape(*image_shape[:2], -1).sum(-1)
