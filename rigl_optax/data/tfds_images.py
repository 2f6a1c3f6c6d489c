"""A split of a prepared TFDS directory, read whole without TensorFlow.

TFDS itself reads array_record without TensorFlow, but not tfrecord, which most existing
directories are. Tfrecord shards are therefore walked here: a record is its length (8 bytes,
little-endian), 4 bytes of checksum, the payload, 4 bytes of checksum.
"""

import importlib.util
import pathlib
import struct
from collections.abc import Iterator
from typing import Any

import numpy as np

from rigl_optax.data import batches


def read(
    data_dir: pathlib.Path, name: str, split: str, left_out: list[str], max_bad_records: int
) -> batches.Split:
    """All images and labels of a split; grey images lose their channel axis.

    Args:
      data_dir: The directory given to TFDS as `data_dir`; nothing is downloaded.
      name: The dataset's name, as `fashion_mnist`.
      split: `train` or `test`.
      left_out: Gets a line for each record that cannot be read, and is therefore left out.
      max_bad_records: How many lines it may come to have.

    Returns:
      Images uint8 (examples, height, width[, channels]), labels int32 (examples,), in the
      order of the files.

    Raises:
      ImportError: If `tensorflow_datasets` is not installed.
      FileNotFoundError: If the directory holds no prepared dataset of that name.
      ValueError: If the number of records is not what the dataset's own metadata says, or
        more of them cannot be read than may be left out.
    """
    if importlib.util.find_spec("tensorflow_datasets") is None:
        raise ImportError(
            f"{data_dir} holds TFDS data; reading it needs "
            "`pip install tensorflow-datasets array-record importlib_resources pillow` "
            "(TensorFlow is not needed)"
        )
    import tensorflow_datasets as tfds

    builder = _builder(tfds, data_dir, name)
    if split not in builder.info.splits:
        raise FileNotFoundError(
            f"{builder.data_path} has no split {split!r}; it has {', '.join(builder.info.splits)}"
        )
    info = builder.info.splits[split]
    if str(builder.info.file_format).endswith("TFRECORD"):
        paths = [pathlib.Path(path) for path in info.filepaths]
        records = [record for path in paths for record in tfrecords(path)]
        decode = builder.info.features.deserialize_example_np
    else:
        records = builder.as_data_source(split)
        decode = dict  # an example already, decoded when it is looked up
    if len(records) != info.num_examples:
        raise ValueError(
            f"{builder.data_path}: {len(records)} examples in split {split!r}, "
            f"{info.num_examples} by its metadata"
        )
    found = []
    for i in range(len(records)):
        try:
            example = decode(records[i])
            found.append((example["image"], example["label"]))
        except Exception as error:  # a damaged record fails in whatever part of it is damaged
            reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
            left_out.append(f"{name}, {split}, record {i}: {reason}")
            if len(left_out) > max_bad_records:
                raise ValueError(
                    f"{builder.data_path}: record {i} of split {split!r} cannot be read "
                    f"({reason}), and config.max_bad_records={max_bad_records}"
                ) from error
    images = np.stack([image for image, _ in found]).astype(np.uint8)
    labels = np.array([label for _, label in found], np.int32)
    return batches.Split(images[..., 0] if images.shape[-1] == 1 else images, labels)


def tfrecords(path: pathlib.Path) -> Iterator[bytes]:
    """The records of a tfrecord file; checksums are not verified.

    Raises:
      ValueError: If the file ends within a record.
    """
    raw = path.read_bytes()
    position = 0
    while position < len(raw):
        end = position + 12
        if end <= len(raw):
            (length,) = struct.unpack_from("<Q", raw, position)
            end += length + 4
        if end > len(raw):
            raise ValueError(f"{path}: cut off within the record at byte {position}")
        yield raw[position + 12 : end - 4]
        position = end


def _builder(tfds: Any, data_dir: pathlib.Path, name: str) -> Any:
    """The newest version prepared; from its own metadata, so any builder's directory works."""
    prepared = sorted(
        (path.parent for path in (data_dir / name).glob("**/dataset_info.json")),
        key=lambda folder: [int(part) for part in folder.name.split(".") if part.isdigit()],
    )
    if not prepared:
        raise FileNotFoundError(
            f"{data_dir / name} holds no prepared TFDS dataset: no VERSION/dataset_info.json in it"
        )
    return tfds.builder_from_directory(prepared[-1])
