"""Reads any image classification set that TFDS has prepared: `config.data.name=tfds/cifar100`."""

import math
import pathlib

from rigl_optax.data import batches, photos, tfds_directory, tfds_images
from rigl_optax.data.records import BadRecords

# Images of one shape that take no more stay in memory; others are decoded for each batch.
IN_MEMORY = 2 << 30
HELD_OUT, MOST = 0.1, 5_000  # the part of the training images that validates, where none is given


def prepare(name: str) -> str:
    """Returns how to prepare a set, for messages."""
    return (
        f"`pip install tensorflow-datasets tensorflow`, `rigl-optax prepare {name} "
        "--data_dir=DIRECTORY` (training needs neither package); then pass "
        "--config.data.dir=DIRECTORY"
    )


def load(
    name: str,
    data_dir: str,
    max_bad_records: int,
    size: int,
    threads: int,
    validation_fraction: float = 0.0,
) -> batches.Dataset:
    """Loads a set of images with one label each.

    Images of one shape are read into memory; photos of many shapes, and sets that take more than
    2 GiB, stay in their files and are resized as they are decoded. The test split is `test`, or
    `validation` where there is none.

    Args:
      name: As TFDS calls it, with its config if it has several: `cifar100`, `imagenette/160px`.
      data_dir: The `data_dir` that was given to TFDS, or the folder of the version itself.
      max_bad_records: How many unreadable records are tolerated.
      size: Side of the squares that photos are resized to, in pixels.
      threads: Number of threads that decode photos.
      validation_fraction: The fraction of the training images that is held out for validation. 0:
        the split `validation` if there is a `test` besides; else of images in memory the last
        tenth, at most 5,000, and of photos as `photos.dataset` says.

    Returns:
      The dataset.

    Raises:
      FileNotFoundError: If the set is not there, or has no split to test on.
      ValueError: If it is damaged, or `size` is missing.
    """
    if not data_dir:
        raise FileNotFoundError(f"config.data.dir is empty. For tfds/{name}: {prepare(name)}")
    found = tfds_directory.find(pathlib.Path(data_dir), name, prepare(name))
    test = next((split for split in ("test", "validation") if split in found.splits), None)
    if test is None or "train" not in found.splits:
        raise FileNotFoundError(
            f"{found.folder} has the splits {', '.join(found.splits)}; wanted are train, and test "
            "or validation"
        )
    shape = found.features.shape
    examples = sum(len(found.splits[split]) for split in ("train", test))
    if shape and examples * math.prod(shape) <= IN_MEMORY:
        return _in_memory(found, test, max_bad_records, validation_fraction)
    if size == 0:
        raise ValueError(
            f"config.data.image_size=0: photos of tfds/{name} are not kept in memory; give a "
            "size, as 224"
        )
    return photos.dataset(
        found.records("train"),
        found.records(test),
        found.classes,
        max_bad_records,
        size,
        threads,
        validation_fraction,
    )


def _in_memory(
    found: tfds_directory.Directory, test: str, max_bad_records: int, validation_fraction: float
) -> batches.Dataset:
    bad_records = BadRecords(max_bad_records)
    train = tfds_images.read(found, "train", bad_records)
    examples = len(train.labels)
    if test == "test" and "validation" in found.splits and not validation_fraction:
        validation = tfds_images.read(found, "validation", bad_records)
    else:
        held_out = round(validation_fraction * examples) or min(MOST, round(HELD_OUT * examples))
        held_out = max(1, held_out)
        if examples <= held_out:
            raise ValueError(f"{found.folder}: {examples} training images are too few")
        validation = train._replace(
            images=train.images[-held_out:], labels=train.labels[-held_out:]
        )
        train = train._replace(images=train.images[:-held_out], labels=train.labels[:-held_out])
    return batches.Dataset(
        train=train,
        validation=validation,
        test=tfds_images.read(found, test, bad_records),
        classes=found.classes,
        maximum=255.0,
        bad_records=bad_records.lines,
    )
