"""Splits of photos that stay encoded in their files until a batch needs them."""

import dataclasses
import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType

import numpy as np

from rigl_optax.data import crops, extras
from rigl_optax.data.batches import Batch, BatchPart, Dataset
from rigl_optax.data.records import BadRecords, Records

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's channels
# Without `validation_fraction`, 1 % of the training photos is held out for validation, but at
# least 500, or a tenth of all if that is less.
HELD_OUT, LEAST = 0.01, 500
_ORDER_SEED = 0
# A tree of at most 1,000 photos is read once before training, up to 64 MB, which takes seconds.
CHECKED, CHECKED_BYTES = 1_000, 64_000_000
_CHUNK = 4  # photos that a thread decodes in one task


@dataclasses.dataclass(frozen=True)
class Photos:
    """A split of photos in files.

    Attributes:
      records: All records of the files.
      members: int64 (examples,), indices of the records in this split.
      classes: Number of classes; labels are 0 to `classes - 1`.
      size: Side of the squares that photos are resized to, in pixels.
      bad_records: Collects the records that cannot be read.
      threads: Number of threads that decode.
    """

    records: Records
    members: np.ndarray
    classes: int
    size: int
    bad_records: BadRecords
    threads: int

    @property
    def examples(self) -> int:
        """Number of examples."""
        return len(self.members)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of an image."""
        return (self.size, self.size, 3)

    def training(self, indices: np.ndarray, augment: str, part: BatchPart) -> Batch:
        """Returns augmented examples; see `batches.Examples`.

        A record that cannot be read is replaced by the next one of the split that can: the same
        one on every host and after every restart.
        """
        drawn = crops.draws(*part) if augment == "resized_crop" else None

        def fill(row: int, image: np.ndarray) -> int:
            numbers = None if drawn is None else drawn[row]
            for further in range(self.examples):
                label = self._read((indices[row] + further) % self.examples, numbers, image)
                if label is not None:
                    return label
            raise ValueError("no photo of the split can be read")

        return self._batch(len(indices), fill)

    def evaluation(self, indices: np.ndarray) -> Batch:
        """Returns the central crops of examples; see `batches.Examples`."""
        weights = np.ones(len(indices), np.float32)

        def fill(row: int, image: np.ndarray) -> int:
            label = self._read(indices[row], None, image)
            if label is None:
                image[:], weights[row] = 0, 0
            return label or 0

        return self._batch(len(indices), fill) | {"weights": weights}

    def _read(self, at: int, numbers: np.ndarray | None, image: np.ndarray) -> int | None:
        """Decodes a photo into `image` and returns its label.

        Args:
          at: Index in the split.
          numbers: (crops.DRAWS,), for a random crop; None for the central one.
          image: uint8 (size, size, 3), overwritten.

        Returns:
          The label; None if the record cannot be read, which is recorded in `bad_records`.
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
            _decode().photo(record.image, choose, image, flip=flip)
        except ValueError as error:
            self.bad_records.add(self.records.name(i), error)
            return None
        return record.label

    def _batch(self, count: int, fill: Callable[[int, np.ndarray], int]) -> Batch:
        """Makes a batch of `count` rows on all threads.

        Args:
          count: Number of examples.
          fill: `fill(row, image) -> label`; overwrites `image`, uint8 (size, size, 3).
        """
        images = np.empty((count, *self.image_shape), np.uint8)
        labels = np.empty(count, np.int32)

        def fill_chunk(start: int) -> None:
            for row in range(start, min(start + _CHUNK, count)):
                labels[row] = fill(row, images[row])

        list(_pool(self.threads).map(fill_chunk, range(0, count, _CHUNK)))
        return {"images": images, "labels": labels}


def _decode() -> ModuleType:
    return extras.load("rigl_optax.data.decode", "images")


def dataset(
    train: Records,
    test: Records,
    classes: int,
    max_bad_records: int,
    size: int,
    threads: int,
    validation_fraction: float = 0.0,
) -> Dataset:
    """Makes three splits of photos; a fixed random part of the training records is validation.

    Args:
      train: Training records.
      test: Test records.
      classes: Number of classes.
      max_bad_records: How many unreadable records a process tolerates; one more is an error. In
        training the next record replaces one, in evaluation it does not count.
      size: Side of the squares that photos are resized to, in pixels.
      threads: Number of threads that decode.
      validation_fraction: Fraction of the training records that is held out for validation. 0: 1 %,
        but at least 500, or a tenth of all if that is less.

    Raises:
      ImportError: If what decodes photos is not installed.
      ValueError: If there are too few photos, or too many that cannot be read.
    """
    _decode()
    held_out = round((validation_fraction or HELD_OUT) * len(train))
    least = 1 if validation_fraction else min(LEAST, len(train) // 10)
    held_out = max(1, held_out, least)
    if len(train) <= held_out or not len(test):
        raise ValueError(f"{len(train)} photos for training and {len(test)} for tests are too few")
    key = np.random.Philox(key=_ORDER_SEED)
    order = np.random.Generator(key).permutation(len(train))
    bad_records = BadRecords(max_bad_records)

    def split(records: Records, members: np.ndarray) -> Photos:
        # Sorted, so that an evaluation reads the files in order.
        return Photos(records, np.sort(members), classes, size, bad_records, threads)

    if len(train) + len(test) <= CHECKED:
        budget = CHECKED_BYTES
        for records in (train, test):
            budget = _check(split(records, np.arange(len(records))), budget)
    return Dataset(
        train=split(train, order[held_out:]),
        validation=split(train, order[:held_out]),
        test=split(test, np.arange(len(test))),
        classes=classes,
        maximum=255.0,
        bad_records=bad_records.lines,
        mean=MEAN,
        deviation=DEVIATION,
    )


def _check(photos: Photos, budget: int) -> int:
    """Reads photos once, so that a damaged one ends a run before anything is compiled.

    Stops after `budget` encoded bytes, and returns what remains of the budget.
    """
    for start in range(0, photos.examples, photos.threads * _CHUNK):
        if budget <= 0:
            break
        stop = min(start + photos.threads * _CHUNK, photos.examples)
        photos.evaluation(np.arange(start, stop))
        budget -= sum([_bytes(photos.records, i) for i in range(start, stop)])
    return budget


def _bytes(records: Records, i: int) -> int:
    """Returns the length of an encoded image in bytes; 0 if it cannot be read."""
    try:
        return len(records.read(i).image)
    except ValueError:
        return 0


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """Returns the thread pool that all splits share."""
    return ThreadPoolExecutor(threads, thread_name_prefix="photos")
