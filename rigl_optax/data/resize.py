"""Resizes all images of an in-memory dataset once, before training."""

import jax
import jax.numpy as jnp
import numpy as np

from rigl_optax.data import batches

_PART = 5_000  # images resized by one call, which bounds the memory of their float32 copies


def resized(dataset: batches.Dataset, size: int) -> batches.Dataset:
    """Resizes the images of all three splits bilinearly to `size` x `size` pixels.

    Args:
      dataset: Its splits are `batches.Split`, in memory.
      size: Pixels of each side; 0 leaves the images as they are.

    Returns:
      The dataset with images of the same dtype; `dataset` itself if there is nothing to do.
    """
    shape = dataset.train.images.shape[1:3]
    if not size or shape == (size, size):
        return dataset
    train, validation, test = (
        split._replace(images=_resize(split.images, size))
        for split in (dataset.train, dataset.validation, dataset.test)
    )
    return dataset._replace(train=train, validation=validation, test=test)


def _resize(images: np.ndarray, size: int) -> np.ndarray:
    @jax.jit
    def resize(part: jax.Array) -> jax.Array:
        shape = (len(part), size, size, *images.shape[3:])
        found = jax.image.resize(part.astype(jnp.float32), shape, "linear")
        return jnp.rint(found).astype(images.dtype)

    # On the CPU whatever the accelerator is: the pixels, and so the results, are the same.
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        parts = [
            np.asarray(resize(part)) for part in np.array_split(images, -(-len(images) // _PART))
        ]
    return np.concatenate(parts)
