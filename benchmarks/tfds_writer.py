"""Writes a directory as TFDS prepares one, with neither TFDS nor TensorFlow; for tests too.

`dataset_info.json` and `features.json` hold what TFDS 4.9 writes for `imagenet2012`, `cifar10` and
`fashion_mnist`; directories of the stock builders were compared with it by hand (docs/data.md).
"""

import json
import pathlib
import struct

import numpy as np

from rigl_optax.data import tf_example, tfrecord

VERSIONS = {"imagenet2012": "5.1.0", "cifar10": "3.0.2", "fashion_mnist": "3.0.1"}


def frame(payload) -> bytes:
    """Frames a record of a tfrecord file with its length and checksums."""
    length = struct.pack("<Q", len(payload))
    sums = [struct.pack("<I", tfrecord.masked_crc(part)) for part in (length, payload)]
    return length + sums[0] + payload + sums[1]


def write_tfrecord(path, payloads) -> None:
    """Writes a tfrecord file."""
    path.write_bytes(b"".join(map(frame, payloads)))


def write_array_record(path, payloads) -> None:
    """Writes an ArrayRecord file."""
    from array_record.python import array_record_module

    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
    for payload in payloads:
        writer.write(payload)
    writer.close()


def write(
    data_dir,
    name,
    splits,
    classes,
    file_format="tfrecord",
    shards=2,
    *,
    shape=(-1, -1, 3),
    image="image",
    label="label",
) -> pathlib.Path:
    """Writes a dataset.

    Args:
      data_dir: A folder; the dataset is written to `name/version/` in it.
      name: The name of the dataset.
      splits: The examples of each split, (encoded image, label).
      classes: The number of classes.
      file_format: tfrecord or array_record.
      shards: The number of files of each split.
      shape: Height, width, channels as the metadata have them; -1 where they differ.
      image: The name of the image in a record.
      label: The name of the label.

    Returns:
      The folder of the version.
    """
    folder = data_dir / name / VERSIONS.get(name, "1.0.0")
    name = name.split("/")[0]
    folder.mkdir(parents=True)
    infos = []
    for split, examples in splits.items():
        records = [
            tf_example.serialize({image: encoded, label: number, "file_name": b"x.JPEG"})
            for encoded, number in examples
        ]
        parts = [[records[i] for i in p] for p in np.array_split(np.arange(len(records)), shards)]
        for i, part in enumerate(parts):
            path = folder / f"{name}-{split}.{file_format}-{i:05}-of-{shards:05}"
            (write_tfrecord if file_format == "tfrecord" else write_array_record)(path, part)
        infos.append(
            {
                "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
                "name": split,
                "numBytes": str(sum(map(len, records))),
                "shardLengths": [str(len(part)) for part in parts],
            }
        )
    info = {"fileFormat": file_format, "name": name, "splits": infos, "version": folder.name}
    (folder / "dataset_info.json").write_text(json.dumps(info, indent=2))
    kinds = "tensorflow_datasets.core.features"
    features = {
        image: {
            "image": {"dtype": "uint8", "shape": {"dimensions": [str(size) for size in shape]}},
            "pythonClassName": f"{kinds}.image_feature.Image",
        },
        label: {
            "classLabel": {"numClasses": str(classes)},
            "pythonClassName": f"{kinds}.class_label_feature.ClassLabel",
        },
    }
    features_json = {
        "featuresDict": {"features": features},
        "pythonClassName": f"{kinds}.features_dict.FeaturesDict",
    }
    (folder / "features.json").write_text(json.dumps(features_json, indent=4))
    return folder
