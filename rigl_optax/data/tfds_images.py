"""Reads a whole split of small images from a prepared TFDS directory into memory."""

import numpy as np

from rigl_optax.data import batches, extras
from rigl_optax.data.records import BadRecords
from rigl_optax.data.tfds_directory import Directory


def read(directory: Directory, split: str, bad_records: BadRecords) -> batches.Split:
    """Reads all images of a split, which must have one shape; grey ones have no channel axis.

    Args:
      directory: From `tfds_directory.find`.
      split: `train` or `test`.
      bad_records: Collects the records that cannot be read, which are left out.

    Returns:
      Images uint8 (examples, height, width[, channels]), labels int32 (examples,), in the
      order of the files.

    Raises:
      ImportError: If what decodes images is not installed.
      FileNotFoundError: If there is no such split, or not all of its files are there.
      ValueError: If the files are not what the metadata say, or too many records cannot be read.
    """
    decode = extras.load("rigl_optax.data.decode", "images")
    records = directory.records(split)
    images: list[np.ndarray] = []
    labels = []
    for i in range(len(records)):
        try:
            record = records.read(i)
            image = decode.stored(record.image)
            if images and image.shape != images[0].shape:
                raise ValueError(f"its shape is {image.shape}, others have {images[0].shape}")
            if not 0 <= record.label < directory.classes:
                raise ValueError(f"label {record.label}; there are {directory.classes} classes")
        except ValueError as error:
            bad_records.add(records.name(i), error)
            continue
        images.append(image)
        labels.append(record.label)
    if not images:
        raise ValueError(f"{directory.folder}: no image of split {split!r} can be read")
    return batches.Split(np.stack(images), np.array(labels, np.int32))
