"""Fingerprints of data, so that a run goes on with those it began with."""

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from rigl_optax.data import photos, text

_PLACES = 64  # of each split that are looked at, evenly spread
_BYTES = 4096  # of a text, at each of them
_RECORDS = 16  # photos: each is a file to open


def of(dataset: Any) -> dict[str, str]:
    """Returns what tells a dataset from another: `{split: size and a hash of a sample}`.

    It takes milliseconds: a sample may miss a difference.

    Args:
      dataset: Of `setup.Run.dataset`.
    """
    found = {}
    for name in ("train", "validation", "test"):
        split = getattr(dataset, name)
        hashed = hashlib.blake2b(digest_size=8)
        for part in _sample(split):
            hashed.update(part)
        size = len(split.tokens) if isinstance(split, text.Part) else split.examples
        found[name] = f"{size:,} {'bytes' if isinstance(split, text.Part) else 'examples'}, "
        found[name] += hashed.hexdigest()
    if hasattr(dataset, "classes"):
        found["classes"] = str(dataset.classes)
    return found


def _sample(split: Any) -> Iterator[bytes]:
    """Parts of a split, the same whenever it is the same."""
    if isinstance(split, text.Part):
        for start in _spread(len(split.tokens), _PLACES):
            yield np.asarray(split.tokens[start : start + _BYTES]).tobytes()
        yield np.asarray(split.starts, np.int64)[:: max(1, len(split.starts) // 1000)].tobytes()
    elif isinstance(split, photos.Photos):
        for number in split.members[_spread(split.examples, _RECORDS)]:
            try:
                record = split.records.read(int(number))
                yield record.image[:_BYTES] + str((len(record.image), record.label)).encode()
            except (ValueError, OSError):
                yield b"cannot be read"  # training will say so when it comes to it
    else:
        yield repr(split.image_shape).encode()
        places = _spread(split.examples, _PLACES)
        yield np.ascontiguousarray(split.images[places]).tobytes()
        yield np.ascontiguousarray(split.labels).tobytes()


def _spread(count: int, most: int) -> np.ndarray:
    return np.unique(np.linspace(0, count - 1, min(count, most)).astype(np.int64))
