"""Reads a tree of photos: `root/train/<class>/<anything>.jpeg` and `root/val/<class>/...`."""

import logging
import os
import pathlib

from rigl_optax.data import batches, photos
from rigl_optax.data.hidden import is_hidden
from rigl_optax.data.records import Record

_LOG = logging.getLogger(__name__)
SUFFIXES = (".jpeg", ".jpg", ".png")
TREE = (
    "A tree of photos is ROOT/train/CLASS/*.jpeg and ROOT/val/CLASS/*.jpeg. Of ImageNet: "
    "`tar -xf ILSVRC2012_img_train.tar -C ROOT/train`, then each CLASS.tar in it into "
    "ROOT/train/CLASS; pass ROOT as --config.data.dir=ROOT"
)


def load(
    data_dir: str,
    max_bad_records: int,
    size: int,
    threads: int,
    validation_fraction: float = 0.0,
) -> batches.Dataset:
    """Loads the photos of a tree; those under `val` are the test split.

    Args:
      data_dir: Root of the tree.
      max_bad_records: How many unreadable photos are tolerated; see `photos.dataset`.
      size: Side of the squares that photos are resized to, in pixels.
      threads: Number of threads that decode.
      validation_fraction: Fraction of the training photos that is held out; see `photos.dataset`.

    Raises:
      FileNotFoundError: If there is no such tree.
      ValueError: If there are no photos in it, or `val` has classes that `train` has not.
    """
    if not data_dir:
        raise FileNotFoundError(f"config.data.dir is empty. {TREE}")
    root = pathlib.Path(data_dir)
    names = classes(root / "train")
    classes(root / "val")
    train, test = (Folder(root / part, names) for part in ("train", "val"))
    return photos.dataset(
        train, test, len(names), max_bad_records, size, threads, validation_fraction
    )


class Folder:
    """The photos of one split, in the order of their paths."""

    def __init__(self, root: pathlib.Path, classes: list[str]) -> None:
        """Lists the files once.

        Args:
          root: Holds a folder for every class that occurs.
          classes: Names of all classes, in the order of their labels.

        Raises:
          ValueError: If there is a folder that is not among `classes`, or no photo at all.
        """
        self._root = root
        found = _folders(root)
        if unknown := sorted(set(found) - set(classes)):
            raise ValueError(f"{root} has classes that the training photos have not: {unknown[:5]}")
        self._files = [
            (label, name)
            for label, cls in enumerate(classes)
            if cls in found
            for name in sorted(os.listdir(root / cls))
            if name.lower().endswith(SUFFIXES) and not is_hidden(name)
        ]
        if not self._files:
            raise ValueError(
                f"{root} holds no photos ({', '.join(SUFFIXES)}) in folders of classes"
            )
        has_photos = {label for label, _ in self._files}
        if empty := [
            c for label, c in enumerate(classes) if c in found and label not in has_photos
        ]:
            _LOG.warning(
                "%s has %d classes without a photo (%s); they are counted among the %d classes",
                root,
                len(empty),
                ", ".join(empty[:5]),
                len(classes),
            )
        self._classes = classes

    def __len__(self) -> int:
        """Returns the number of photos."""
        return len(self._files)

    def read(self, i: int) -> Record:
        """Reads a photo; raises a ValueError if the file cannot be read."""
        try:
            return Record(self._path(i).read_bytes(), self._files[i][0])
        except OSError as error:
            raise ValueError(f"{error}") from error

    def name(self, i: int) -> str:
        """Returns the path of a photo."""
        return str(self._path(i))

    def _path(self, i: int) -> pathlib.Path:
        label, name = self._files[i]
        return self._root / self._classes[label] / name


def classes(root: pathlib.Path) -> list[str]:
    """Lists the classes of a split in alphabetical order; a class's index is its label.

    Raises:
      FileNotFoundError: If `root` does not exist, or has no folders in it.
    """
    found = _folders(root) if root.is_dir() else []
    if not found:
        raise FileNotFoundError(f"{root} does not exist, or has no folders in it. {TREE}")
    return found


def _folders(root: pathlib.Path) -> list[str]:
    return sorted(e.name for e in os.scandir(root) if e.is_dir() and not is_hidden(e.name))
