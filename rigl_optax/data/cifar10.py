"""CIFAR-10 from the six files of its binary version, or from a prepared TFDS directory."""

import pathlib

import numpy as np

from rigl_optax.data import batches, tfds_directory, tfds_images
from rigl_optax.data.records import BadRecords

CLASSES = 10
SHAPE = (3, 32, 32)  # an image in the binary version: planes of red, green, blue
TRAIN = [f"data_batch_{i}.bin" for i in range(1, 6)]
TEST = ["test_batch.bin"]
PER_FILE = 10_000
VALIDATION = 2_500  # the last of the training images
BINARY, PYTHON = "cifar-10-batches-bin", "cifar-10-batches-py"
PREPARE = (
    "`tfds build cifar10 --data_dir=DIRECTORY` (needs TensorFlow; reading does not), or unpack "
    "cifar-10-binary.tar.gz from https://www.cs.toronto.edu/~kriz/cifar.html into DIRECTORY; then "
    "pass --config.data.dir=DIRECTORY"
)


def load(data_dir: str, max_bad_records: int = 0) -> batches.Dataset:
    """Loads CIFAR-10, split 47,500 / 2,500 / 10,000 into train, validation and test.

    Args:
      data_dir: A folder with the six files `*.bin`, or with `cifar-10-batches-bin` that holds
        them; or a TFDS directory with `cifar10`, tfrecord or array_record.
      max_bad_records: How many unreadable records of a TFDS directory may be skipped, over all
        splits. The files of the binary version have no checksums.

    Returns:
      Images uint8 (examples, 32, 32, 3), each to be standardised, and labels int32 (examples,).
      The last 2,500 training examples are the validation split; the files are shuffled already.

    Raises:
      FileNotFoundError: If the data are not there; the message says how to get them.
      ValueError: If a file is not what its name says, or too many records cannot be read.
    """
    if not data_dir:
        raise FileNotFoundError(f"config.data.dir is empty; no CIFAR-10 is installed: {PREPARE}")
    directory = pathlib.Path(data_dir)
    bad_records = BadRecords(max_bad_records)
    folders = (directory, directory / BINARY)
    binary = next((f for f in folders if any((f / n).is_file() for n in TRAIN + TEST)), None)
    if binary is not None:
        train, test = (read_binary([binary / n for n in names]) for names in (TRAIN, TEST))
    else:
        if any((directory / name).exists() for name in (PYTHON, "data_batch_1")):
            raise ValueError(
                f"{directory} holds the Python version of CIFAR-10, which is pickled and not "
                "read: a pickle executes what is in it. Take the binary version"
            )
        found = tfds_directory.find(directory, "cifar10", PREPARE)
        train, test = (tfds_images.read(found, split, bad_records) for split in ("train", "test"))
    if len(train.labels) <= VALIDATION:
        raise ValueError(
            f"{directory} has {len(train.labels)} training images; the last {VALIDATION} are for "
            "validation, so there must be more"
        )
    train, test = train._replace(standardised=True), test._replace(standardised=True)
    return batches.Dataset(
        train=train._replace(images=train.images[:-VALIDATION], labels=train.labels[:-VALIDATION]),
        validation=train._replace(
            images=train.images[-VALIDATION:], labels=train.labels[-VALIDATION:]
        ),
        test=test,
        classes=CLASSES,
        maximum=255.0,
        bad_records=bad_records.lines,
    )


def read_binary(paths: list[pathlib.Path]) -> batches.Split:
    """Reads files of the binary version, in which an example is a label and 3,072 pixels.

    Args:
      paths: Files of `PER_FILE` examples each.

    Returns:
      Images uint8 (examples, 32, 32, 3) and labels int32 (examples,).

    Raises:
      FileNotFoundError: If a file is missing.
      ValueError: If a file has another size, or a label above 9.
    """
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise FileNotFoundError(f"{paths[0].parent} has no {', '.join(missing)}: {PREPARE}")
    size = 1 + int(np.prod(SHAPE))
    parts = []
    for path in paths:
        found = path.stat().st_size
        if found != size * PER_FILE:
            raise ValueError(
                f"{path}: {found} bytes; {size * PER_FILE} for {PER_FILE} images. {PREPARE}"
            )
        parts.append(np.fromfile(path, np.uint8).reshape(PER_FILE, size))
        if parts[-1][:, 0].max() >= CLASSES:
            raise ValueError(f"{path}: label {parts[-1][:, 0].max()}; classes are 0 to 9")
    raw = np.concatenate(parts)
    images = raw[:, 1:].reshape(-1, *SHAPE).transpose(0, 2, 3, 1)
    return batches.Split(np.ascontiguousarray(images), raw[:, 0].astype(np.int32))
