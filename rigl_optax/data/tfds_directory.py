"""Reads a prepared TFDS directory, tfrecord or array_record, without TensorFlow or TFDS.

Two JSON files describe it: `dataset_info.json` (splits, number of records in each shard, names of
the files) and `features.json` (what is the image and what the label, number of classes).
"""

import functools
import json
import pathlib
import threading
from typing import Any, NamedTuple

import numpy as np

from rigl_optax.data import hidden, tf_example, tfrecord
from rigl_optax.data.records import DamagedFileError, Record

INFO, FEATURES = "dataset_info.json", "features.json"
_TEMPLATE = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
FORMATS = ("tfrecord", "array_record")


class Features(NamedTuple):
    """Which features of a record are read.

    Attributes:
      image: Name of the image.
      shape: Height, width, channels; empty if images have many shapes.
      label: Name of the label.
      classes: Number of classes.
    """

    image: str
    shape: tuple[int, ...]
    label: str
    classes: int


class Directory(NamedTuple):
    """The contents of a directory, as its metadata declare them.

    Attributes:
      folder: The directory.
      features: What the records hold.
      splits: The shards of each split, by its name.
    """

    folder: pathlib.Path
    features: Features
    splits: "dict[str, Shards]"

    @property
    def classes(self) -> int:
        """Number of classes."""
        return self.features.classes

    def records(self, split: str) -> "Shards":
        """Returns the records of a split, after a look at its files.

        Raises:
          FileNotFoundError: If there is no such split, or not all of its files are there.
          ValueError: If the files have not the size that they had when they were prepared.
        """
        if split not in self.splits:
            raise FileNotFoundError(
                f"{self.folder} has no split {split!r}; it has {', '.join(self.splits)}"
            )
        self.splits[split].check()
        return self.splits[split]


def find(data_dir: pathlib.Path, name: str, prepare: str) -> Directory:
    """Finds the newest version of a prepared dataset.

    Args:
      data_dir: The `data_dir` that was given to TFDS; or the folder of the version itself.
      name: Name of the dataset, as `imagenet2012`.
      prepare: The command that prepares it, for the error message.

    Raises:
      FileNotFoundError: If the dataset is not there, or its preparation was not finished.
      ValueError: If its metadata cannot be read.
    """
    if (data_dir / INFO).is_file():
        return read(data_dir)
    inside = data_dir if data_dir.name == name else data_dir / name
    prepared = [
        path.parent
        for path in sorted(inside.glob(f"**/{INFO}"))
        if hidden.is_visible(path, inside)
        and not any(part.startswith("incomplete.") for part in path.parts)
    ]
    if not prepared:
        begun = list(inside.glob("**/incomplete.*"))
        state = f"only what was begun and not finished ({begun[0]})" if begun else "nothing"
        raise FileNotFoundError(
            f"{inside} holds no prepared TFDS dataset {name}, but {state}. To prepare it: {prepare}"
        )
    return read(max(prepared, key=lambda folder: _version(folder.name)))


def read(folder: pathlib.Path) -> Directory:
    """Reads the metadata of one version.

    Args:
      folder: The folder of the version, with `dataset_info.json` and `features.json`.

    Raises:
      ValueError: If a JSON file is missing, or not what TFDS writes.
    """
    info, features = _json(folder / INFO), _json(folder / FEATURES)
    try:
        read = _features(features["featuresDict"]["features"])
        file_format = info.get("fileFormat", "tfrecord")
        found = [
            _shards(folder, info["name"], file_format, split, read) for split in info["splits"]
        ]
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{folder}: its metadata are not those of images ({what})") from error
    if read.classes < 1:
        raise ValueError(f"{folder / FEATURES}: {read.classes} classes")
    return Directory(folder, read, {shards.split: shards for shards in found})


def _features(kinds: dict[str, Any]) -> Features:
    """Finds the image and the label among the features; `read` catches what it raises."""
    label, image = _feature(kinds, "label", "classLabel"), _feature(kinds, "image", "image")
    dimensions = kinds[image]["image"].get("shape", {}).get("dimensions", [])
    shape = tuple(int(size) for size in dimensions)
    return Features(
        image,
        shape if len(shape) == 3 and all(size > 0 for size in shape) else (),
        label,
        int(kinds[label]["classLabel"]["numClasses"]),
    )


def _feature(kinds: dict[str, Any], usual: str, kind: str) -> str:
    """Returns the name of the feature of a kind: the usual name, or the only one there is."""
    found = [name for name, feature in kinds.items() if kind in feature]
    if usual in found:
        return usual
    if len(found) != 1:
        raise ValueError(f"{len(found)} features that are a {kind}, none named {usual!r}")
    return found[0]


class Shards:
    """The records of one split, over its files. A file is indexed when it is first needed.

    Args:
      split: Name of the split.
      file_format: One of `FORMATS`.
      paths: The files, in order.
      lengths: Number of records in each file.
      payload: Bytes of all records together; 0 if not known.
      features: What the records hold.
    """

    def __init__(
        self,
        split: str,
        file_format: str,
        paths: list[pathlib.Path],
        lengths: list[int],
        payload: int,
        features: Features,
    ) -> None:
        self.split = split
        self._format, self._paths, self._lengths, self._payload = (
            file_format,
            paths,
            lengths,
            payload,
        )
        self._features = features
        self._starts = np.cumsum([0, *lengths])
        self._opened: dict[int, Any] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """Returns the number of records."""
        return int(self._starts[-1])

    def check(self) -> None:
        """Checks that all files are there with their full size; raises as `Directory.records`."""
        missing = [path for path in self._paths if not path.is_file()]
        if missing:
            raise FileNotFoundError(
                f"{len(missing)} of the {len(self._paths)} files of split {self.split!r} are not "
                f"there, as {missing[0]}"
            )
        if self._format == "tfrecord" and self._payload:
            around = tfrecord.HEADER + tfrecord.FOOTER
            expected = self._payload + around * len(self)
            size = sum(path.stat().st_size for path in self._paths)
            if size != expected:
                raise ValueError(
                    f"{self._paths[0].parent}: the files of split {self.split!r} have {size} "
                    f"bytes, not {expected} as {INFO} says: they have not been copied to the end"
                )

    def read(self, i: int) -> Record:
        """Reads a record; raises a ValueError if the record or its file is damaged."""
        shard, at = self._place(i)
        opened = self._open(shard)
        if self._format == "tfrecord":
            raw = tfrecord.read(self._paths[shard], *map(int, opened[at]))
        else:
            raw = _read_array_record(opened, self._paths[shard], at)
        return Record(*tf_example.image_and_label(raw, self._features.image, self._features.label))

    def name(self, i: int) -> str:
        """Returns where a record is, for a message."""
        shard, at = self._place(i)
        return f"record {at} of {self._paths[shard]}"

    def _place(self, i: int) -> tuple[int, int]:
        shard = int(np.searchsorted(self._starts, i, side="right")) - 1
        return shard, i - int(self._starts[shard])

    def _open(self, shard: int) -> Any:
        """Returns the index of a tfrecord file, or the reader of an array_record file."""
        if shard not in self._opened:
            with self._lock:
                if shard not in self._opened:  # another thread may have opened it meanwhile
                    self._opened[shard] = self._open_file(shard)
        return self._opened[shard]

    def _open_file(self, shard: int) -> Any:
        path, expected = self._paths[shard], self._lengths[shard]
        if self._format == "tfrecord":
            try:
                opened: Any = tfrecord.index(path)
            except ValueError as error:
                raise DamagedFileError(str(error)) from error
            count = len(opened)
        else:
            opened = _open_array_record(path)
            count = opened.num_records()
        if count != expected:
            raise DamagedFileError(f"{path}: {count} records; {expected} by {INFO}")
        return opened


def _shards(
    folder: pathlib.Path, name: str, file_format: str, split: dict[str, Any], features: Features
) -> Shards:
    """Makes the shards of one entry of `splits` in the metadata; `read` catches what it raises."""
    if file_format not in FORMATS:
        raise ValueError(f"file format {file_format!r}; {' and '.join(FORMATS)} can be read")
    lengths = [int(length) for length in split["shardLengths"]]
    if any(not 0 <= length < 2**40 for length in lengths):
        raise ValueError(f"shard lengths {lengths[:10]}")
    template = split.get("filepathTemplate") or _TEMPLATE
    paths = []
    for shard in range(len(lengths)):
        values = {
            "DATASET": name,
            "SPLIT": split["name"],
            "FILEFORMAT": file_format,
            "SHARD_INDEX": f"{shard:05}",
            "NUM_SHARDS": f"{len(lengths):05}",
            "SHARD_X_OF_Y": f"{shard:05}-of-{len(lengths):05}",
        }
        file = functools.reduce(lambda t, v: t.replace(f"{{{v}}}", values[v]), values, template)
        if "/" in file or "\0" in file or len(file) > 255:
            raise ValueError(f"a file named {file[:80]!r}")
        paths.append(folder / file)
    payload = int(split.get("numBytes", 0))
    return Shards(split["name"], file_format, paths, lengths, payload, features)


def _json(path: pathlib.Path) -> Any:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not TFDS metadata ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: not TFDS metadata (not an object)")
    return value


def _version(name: str) -> list[int]:
    return [int(part) for part in name.split(".") if part.isdigit()]


def _open_array_record(path: pathlib.Path) -> Any:
    from array_record.python import array_record_module

    try:
        # Records are read in random order, so reading ahead would be wasted.
        return array_record_module.ArrayRecordReader(str(path), options="readahead_buffer_size:0")
    except (RuntimeError, ValueError) as error:
        raise DamagedFileError(f"{path}: not an array_record file ({error})") from error


def _read_array_record(reader: Any, path: pathlib.Path, at: int) -> bytes:
    try:
        (raw,) = reader.read([at])
    except (RuntimeError, ValueError, IndexError) as error:
        raise ValueError(f"{path}: record {at} is damaged ({error})") from error
    return bytes(raw)
