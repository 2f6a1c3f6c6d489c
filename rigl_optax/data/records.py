"""Defines random access to encoded photos, and counts the records that cannot be read."""

import logging
import threading
from typing import NamedTuple, Protocol

_LOG = logging.getLogger(__name__)


class Record(NamedTuple):
    """One encoded image (JPEG or PNG), and its label, from 0."""

    image: bytes
    label: int


class Records(Protocol):
    """The records of one split. Safe to read from several threads."""

    def __len__(self) -> int:
        """Returns the number of records."""

    def read(self, i: int) -> Record:
        """Reads the record of this index; raises a ValueError if it is damaged."""

    def name(self, i: int) -> str:
        """Returns where the record is, for a message."""


class DamagedFileError(ValueError):
    """Raised when a file of many records is damaged so that none of them can be found."""


class BadRecords:
    """Collects the records that could not be read; shared by the splits of a dataset.

    Args:
      limit: `config.data.max_bad_records`: one more is an error.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._lines: dict[str, str] = {}
        self._lock = threading.Lock()

    def add(self, name: str, error: ValueError) -> None:
        """Adds a record; one that is met again counts once.

        Args:
          name: Where the record is.
          error: Why it cannot be read.

        Raises:
          ValueError: If the limit is exceeded, or the whole file of the record is damaged.
        """
        if isinstance(error, DamagedFileError):
            raise error
        with self._lock:
            if name in self._lines:
                return
            reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
            if len(self._lines) >= self._limit:
                raise ValueError(
                    f"{name} cannot be read ({reason}), and "
                    f"config.data.max_bad_records={self._limit}"
                ) from error
            self._lines[name] = f"{name}: {reason}"
        _LOG.warning("left out: %s", self._lines[name])  # every host logs its own

    def lines(self) -> tuple[str, ...]:
        """Returns a line for each record, in the order in which they were met."""
        with self._lock:
            return tuple(self._lines.values())
