"""Encoded photos with a class, at random: what every reader of files gives."""

import logging
import threading
from typing import NamedTuple, Protocol

_LOG = logging.getLogger(__name__)


class Record(NamedTuple):
    """One encoded image, and the number of its class, from 0."""

    image: bytes
    label: int


class Records(Protocol):
    """The records of one split. Safe to read from several threads."""

    def __len__(self) -> int:
        """How many there are."""

    def read(self, i: int) -> Record:
        """The record of this index; raises a ValueError if it is damaged."""

    def name(self, i: int) -> str:
        """Where it is, for a message."""


class DamagedFileError(ValueError):
    """A file of many records is not what it should be: none of them can be found."""


class LeftOut:
    """Which records could not be read, at most so many; shared by the splits of a dataset."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._lines: dict[str, str] = {}
        self._lock = threading.Lock()

    def note(self, name: str, error: ValueError) -> None:
        """Notes that a record is left out for this reason; one that is met again counts once.

        Raises:
          ValueError: If it is one too many, or all of its file is damaged.
        """
        if isinstance(error, DamagedFileError):
            raise error
        with self._lock:
            if name in self._lines:
                return
            reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
            if len(self._lines) >= self._most:
                raise ValueError(
                    f"{name} cannot be read ({reason}), and "
                    f"config.data.max_bad_records={self._most}"
                ) from error
            self._lines[name] = f"{name}: {reason}"
        _LOG.warning("left out: %s", self._lines[name])  # each host tells of its own

    def lines(self) -> tuple[str, ...]:
        """A line for each, in the order in which they were met."""
        with self._lock:
            return tuple(self._lines.values())
