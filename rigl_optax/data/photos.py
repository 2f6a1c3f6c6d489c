"""Photos that stay encoded in their files until a batch needs them."""

import dataclasses
import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from rigl_optax.data import crops, decode
from rigl_optax.data.batches import Batch, Dataset, Place
from rigl_optax.data.records import LeftOut, Records

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's channels
HELD_OUT = 0.01  # of the training photos, for validation, if not told otherwise
LEAST = 500  # of them then, or a tenth of all if that is less
_ORDER_SEED = 0
# A tree of so few photos is read once before training, up to so many bytes: in seconds.
CHECKED, CHECKED_BYTES = 1_000, 64_000_000
_TOGETHER = 4  # photos that a thread takes at once


@dataclasses.dataclass(frozen=True)
class Photos:
    """Some of the records of a dataset.

    Attributes:
      records: All of them.
      members: int64 (examples,): which of them are in this split.
      classes: Labels are below it.
      size: Side of the squares that they become.
      left_out: Where a record that cannot be read is noted.
      threads: How many decode at once.
    """

    records: Records
    members: np.ndarray
    classes: int
    size: int
    left_out: LeftOut
    threads: int

    @property
    def examples(self) -> int:
        """How many there are."""
        return len(self.members)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width, channels."""
        return (self.size, self.size, 3)

    def training(self, indices: np.ndarray, augment: str, place: Place) -> Batch:
        """See `batches.Examples`.

        In the place of a record that cannot be read is the next one of the split that can, on
        every host and after every restart the same.
        """
        drawn = crops.draws(*place) if augment == "resized_crop" else None

        def look(row: int, image: np.ndarray) -> int:
            numbers = None if drawn is None else drawn[row]
            for further in range(self.examples):
                label = self._read((indices[row] + further) % self.examples, numbers, image)
                if label is not None:
                    return label
            raise ValueError("no photo of the split can be read")

        return self._all(len(indices), look)

    def evaluation(self, indices: np.ndarray) -> Batch:
        """See `batches.Examples`; the central crop is looked at."""
        weights = np.ones(len(indices), np.float32)

        def look(row: int, image: np.ndarray) -> int:
            label = self._read(indices[row], None, image)
            if label is None:
                image[:], weights[row] = 0, 0
            return label or 0

        return self._all(len(indices), look) | {"weights": weights}

    def _read(self, at: int, numbers: np.ndarray | None, image: np.ndarray) -> int | None:
        """Puts pixels into `image` and returns the label; None, and noted, if it cannot be read.

        Args:
          at: Of the split.
          numbers: (crops.DRAWS,), for a random crop; None for the central one.
          image: (size, size, 3)
        """

        def choose(height: int, width: int) -> crops.Window:
            if numbers is None:
                return crops.central_crop(height, width, self.size)
            return crops.resized_crop(height, width, self.size, numbers)

        i = int(self.members[at])
        try:
            record = self.records.read(i)
            if not 0 <= record.label < self.classes:
                raise ValueError(f"label {record.label}; there are {self.classes} classes")
            flip = numbers is not None and bool(crops.is_flipped(numbers))
            decode.photo(record.image, choose, image, flip=flip)
        except ValueError as error:
            self.left_out.note(self.records.name(i), error)
            return None
        return record.label

    def _all(self, count: int, look: Callable[[int, np.ndarray], int]) -> Batch:
        """What `look` puts into the rows of a batch, and the labels it returns."""
        images = np.empty((count, *self.image_shape), np.uint8)
        labels = np.empty(count, np.int32)

        def some(start: int) -> None:
            for row in range(start, min(start + _TOGETHER, count)):
                labels[row] = look(row, images[row])

        list(_pool(self.threads).map(some, range(0, count, _TOGETHER)))
        return {"images": images, "labels": labels}


def dataset(
    train: Records,
    test: Records,
    classes: int,
    max_bad_records: int,
    size: int,
    threads: int,
    validation_fraction: float = 0.0,
) -> Dataset:
    """Three splits of photos: some of the training records, drawn once, are for validation.

    Args:
      train: Training records.
      test: Test records.
      classes: How many there are.
      max_bad_records: How many records each process may meet that cannot be read. In training the
        next one takes their place, in evaluation they are not counted; one more is an error.
      size: Side of the squares that photos become.
      threads: How many decode at once.
      validation_fraction: Of the training records; 0 for 1 %, but at least 500 or a tenth of all,
        whichever is less.
    """
    held_out = round((validation_fraction or HELD_OUT) * len(train))
    least = 1 if validation_fraction else min(LEAST, len(train) // 10)
    held_out = max(1, held_out, least)
    if len(train) <= held_out or not len(test):
        raise ValueError(f"{len(train)} photos for training and {len(test)} for tests are too few")
    key = np.random.Philox(key=_ORDER_SEED)
    order = np.random.Generator(key).permutation(len(train))
    left_out = LeftOut(max_bad_records)

    def split(records: Records, members: np.ndarray) -> Photos:
        # Neighbours are near each other in the files: an evaluation reads them in order.
        return Photos(records, np.sort(members), classes, size, left_out, threads)

    if len(train) + len(test) <= CHECKED:
        left = CHECKED_BYTES
        for records in (train, test):
            left = _check(split(records, np.arange(len(records))), left)
    return Dataset(
        train=split(train, order[held_out:]),
        validation=split(train, order[:held_out]),
        test=split(test, np.arange(len(test))),
        classes=classes,
        maximum=255.0,
        left_out=left_out.lines,
        mean=MEAN,
        deviation=DEVIATION,
    )


def _check(photos: Photos, left: int) -> int:
    """Reads photos once, so that a damaged one ends a run before anything is compiled.

    Stops after `left` bytes, and returns how many of them are left then.
    """
    for start in range(0, photos.examples, photos.threads * _TOGETHER):
        if left <= 0:
            break
        stop = min(start + photos.threads * _TOGETHER, photos.examples)
        photos.evaluation(np.arange(start, stop))
        left -= sum([_bytes(photos.records, i) for i in range(start, stop)])
    return left


def _bytes(records: Records, i: int) -> int:
    """How long an encoded image is; 0 if it cannot be read."""
    try:
        return len(records.read(i).image)
    except ValueError:
        return 0


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """Threads that all splits share."""
    return ThreadPoolExecutor(threads, thread_name_prefix="photos")
