"""A split of a prepared TFDS directory of small images, read whole."""

import numpy as np

from rigl_optax.data import batches, decode
from rigl_optax.data.records import LeftOut
from rigl_optax.data.tfds_directory import Directory


def read(directory: Directory, split: str, left_out: LeftOut) -> batches.Split:
    """All images and labels of a split, which are of one size; grey ones have no channel axis.

    Args:
      directory: From `tfds_directory.find`.
      split: `train` or `test`.
      left_out: Where a record that cannot be read, and is therefore left out, is noted.

    Returns:
      Images uint8 (examples, height, width[, channels]), labels int32 (examples,), in the
      order of the files.

    Raises:
      FileNotFoundError: If there is no such split, or not all of its files.
      ValueError: If the files are not what the metadata say, or more records cannot be read than
        may be left out.
    """
    records = directory.records(split)
    images: list[np.ndarray] = []
    labels = []
    for i in range(len(records)):
        try:
            record = records.read(i)
            image = decode.stored(record.image)
            if images and image.shape != images[0].shape:
                raise ValueError(f"its shape is {image.shape}, of others {images[0].shape}")
            if not 0 <= record.label < directory.classes:
                raise ValueError(f"label {record.label}; there are {directory.classes} classes")
        except ValueError as error:
            left_out.note(records.name(i), error)
            continue
        images.append(image)
        labels.append(record.label)
    if not images:
        raise ValueError(f"{directory.folder}: no image of split {split!r} can be read")
    return batches.Split(np.stack(images), np.array(labels, np.int32))
