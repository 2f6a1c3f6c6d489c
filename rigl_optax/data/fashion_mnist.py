"""Fashion-MNIST from the four gz IDX files, or from a prepared TFDS directory.

Debian's package `dataset-fashion-mnist` (MIT licence) installs the files in `DEBIAN_DIR`,
where they are looked for when no directory is given.
"""

import gzip
import pathlib
import struct
import zlib

import numpy as np

from rigl_optax.data import batches, tfds_directory, tfds_images
from rigl_optax.data.records import BadRecords

DEBIAN_DIR = "/usr/share/datasets/fashion-mnist"
FILES = {
    "train": ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz", 60_000),
    "test": ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz", 10_000),
}
PREPARE = "`tfds build fashion_mnist --data_dir=DIRECTORY` (needs TensorFlow; reading does not)"
VALIDATION = 5_000  # the last of the training images
IMAGES_MAGIC, LABELS_MAGIC = 0x0803, 0x0801  # IDX: unsigned bytes in three, one dimensions


def load(data_dir: str = "", max_bad_records: int = 0) -> batches.Dataset:
    """Loads Fashion-MNIST, split 55,000 / 5,000 / 10,000 into train, validation and test.

    Args:
      data_dir: A directory with the four gz IDX files, or a TFDS directory that holds
        `fashion_mnist/3.0.1` (array_record or tfrecord). Empty: `DEBIAN_DIR`.
      max_bad_records: How many unreadable records of a TFDS directory may be skipped, over all
        splits. IDX files are read whole or not at all.

    Returns:
      Images uint8 (examples, 28, 28), labels int32 (examples,). The last 5,000 training
      examples are the validation split; the files are shuffled already.

    Raises:
      FileNotFoundError: If the data are not there; the message says how to get them.
      ValueError: If a file is not what its name says, or too many records cannot be read.
    """
    directory = pathlib.Path(data_dir or DEBIAN_DIR)
    names = [name for images, labels, _ in FILES.values() for name in (images, labels)]
    bad_records = BadRecords(max_bad_records)
    missing = [name for name in names if not (directory / name).is_file()]
    if not missing:
        train, test = (_read_idx_split(directory, *FILES[split]) for split in ("train", "test"))
    elif (directory / "fashion_mnist").is_dir():
        found = tfds_directory.find(directory, "fashion_mnist", PREPARE)
        train, test = (tfds_images.read(found, split, bad_records) for split in ("train", "test"))
    else:
        raise FileNotFoundError(
            f"Fashion-MNIST is not in {directory}: no {', '.join(missing)}, and no TFDS directory "
            "fashion_mnist. Install the Debian package dataset-fashion-mnist, or put the four gz "
            "files into a directory and pass it as --config.data.dir=DIRECTORY"
        )
    if len(train.labels) <= VALIDATION:
        raise ValueError(
            f"{directory} has {len(train.labels)} training images; the last {VALIDATION} are for "
            "validation, so there must be more"
        )
    return batches.Dataset(
        train=batches.Split(train.images[:-VALIDATION], train.labels[:-VALIDATION]),
        validation=batches.Split(train.images[-VALIDATION:], train.labels[-VALIDATION:]),
        test=test,
        classes=10,
        maximum=255.0,
        bad_records=bad_records.lines,
    )


def _read_idx_split(
    directory: pathlib.Path, images_name: str, labels_name: str, count: int
) -> batches.Split:
    images = read_idx(directory / images_name, IMAGES_MAGIC, (count, 28, 28))
    labels = read_idx(directory / labels_name, LABELS_MAGIC, (count,))
    if labels.max() > 9:
        raise ValueError(f"{directory / labels_name}: label {labels.max()}; classes are 0 to 9")
    return batches.Split(images, labels.astype(np.int32))


def read_idx(path: pathlib.Path, magic: int, shape: tuple[int, ...]) -> np.ndarray:
    """Reads unsigned bytes of the given shape from a gz IDX file, and checks its header.

    Args:
      path: The file.
      magic: Expected value of its first four bytes, a big-endian number.
      shape: Expected shape, which the header states after that number.

    Returns:
      uint8 array of that shape.

    Raises:
      ValueError: If the file is not gzip, is too short or too long, or its magic number or shape
        differ from the expected ones.
    """
    header_size = 4 + 4 * len(shape)
    expected = header_size + int(np.prod(shape))
    try:
        with gzip.open(path) as file:
            raw = file.read(expected + 1)  # bounded: a hostile file may unpack to any size
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: not a complete gzip file ({error})") from error
    if len(raw) < header_size:
        raise ValueError(f"{path}: {len(raw)} bytes, shorter than its header of {header_size}")
    found_magic, *found = struct.unpack(f">{1 + len(shape)}I", raw[:header_size])
    if found_magic != magic:
        raise ValueError(f"{path}: magic number {found_magic:#010x}, expected {magic:#010x}")
    if tuple(found) != shape:
        raise ValueError(f"{path}: sizes {tuple(found)}, expected {shape}")
    if len(raw) != expected:
        excess = "too many" if len(raw) > expected else "too few"
        raise ValueError(f"{path}: {excess} bytes for sizes {shape}, expected {expected}")
    return np.frombuffer(raw, np.uint8, offset=header_size).reshape(shape)
