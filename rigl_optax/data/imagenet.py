"""Reads ImageNet (ILSVRC 2012) from a prepared TFDS directory, tfrecord or array_record."""

import pathlib

from rigl_optax.data import batches, photos, tfds_directory

NAME = "imagenet2012"
PREPARE = (
    "put ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar (from https://image-net.org) into "
    f"ARCHIVES; `pip install tensorflow tensorflow-datasets`; `tfds build {NAME} "
    "--data_dir=DIRECTORY --manual_dir=ARCHIVES` (reading needs neither); then pass "
    "--config.data.dir=DIRECTORY. Or unpack the archives and take --config.data.name=image_folder"
)


def load(
    data_dir: str,
    max_bad_records: int,
    size: int,
    threads: int,
    validation_fraction: float = 0.0,
) -> batches.Dataset:
    """Loads ImageNet; its own validation photos are the test split, as in the paper.

    Args:
      data_dir: The `data_dir` that was given to TFDS, or the folder of the version itself.
      max_bad_records: How many unreadable records are tolerated; see `photos.dataset`.
      size: Side of the squares that photos are resized to, in pixels.
      threads: Number of threads that decode.
      validation_fraction: Fraction of the training photos that is held out; see `photos.dataset`.

    Raises:
      FileNotFoundError: If the data are missing or incomplete; the message says how to get them.
      ValueError: If they are damaged.
    """
    if not data_dir:
        raise FileNotFoundError(f"config.data.dir is empty. For ImageNet: {PREPARE}")
    found = tfds_directory.find(pathlib.Path(data_dir), NAME, PREPARE)
    train, test = (found.records(split) for split in ("train", "validation"))
    return photos.dataset(
        train, test, found.classes, max_bad_records, size, threads, validation_fraction
    )
