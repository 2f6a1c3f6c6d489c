"""ImageNet (ILSVRC 2012) from a prepared TFDS directory, tfrecord or array_record."""

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
    """ImageNet; its own validation photos are the test split, as in the paper.

    Args:
      data_dir: What was given to TFDS as `data_dir`, or the folder of the version itself.
      max_bad_records: How many records may be left out since they cannot be read; see
        `photos.dataset`.
      size: Side of the squares that photos become.
      threads: How many decode at once.
      validation_fraction: See `photos.dataset`.

    Raises:
      FileNotFoundError: If the data are not there, or not to the end, saying how to get them.
      ValueError: If they are damaged.
    """
    if not data_dir:
        raise FileNotFoundError(f"config.data.dir is empty. For ImageNet: {PREPARE}")
    found = tfds_directory.find(pathlib.Path(data_dir), NAME, PREPARE)
    train, test = (found.records(split) for split in ("train", "validation"))
    return photos.dataset(
        train, test, found.classes, max_bad_records, size, threads, validation_fraction
    )
