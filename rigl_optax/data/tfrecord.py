"""Tfrecord files at random, without TensorFlow: a file is indexed once, then records are read.

A record is its length (8 bytes, little-endian), a checksum of these, the payload, a checksum of
that. The checksums are CRC-32C, masked as TFRecord does.
"""

import os
import pathlib
import struct

import google_crc32c
import numpy as np

HEADER, FOOTER = 12, 4  # bytes before and after a payload
_MASK = 0xA282EAD8


def index(path: pathlib.Path) -> np.ndarray:
    """Where the payloads are: int64 (records, 2), of offset and length.

    Only the headers are read, and their checksums verified.

    Raises:
      ValueError: If the file is cut off within a record, or a header is damaged: what is after it
        cannot be found.
    """
    found = []
    size = path.stat().st_size
    with path.open("rb", buffering=0) as file:
        position = 0
        while position < size:
            header = os.pread(file.fileno(), HEADER, position)
            if len(header) < HEADER:
                raise ValueError(f"{path}: cut off within the record at byte {position}")
            length, checksum = struct.unpack("<QI", header)
            if masked_crc(header[:8]) != checksum:
                raise ValueError(
                    f"{path}: the checksum of the length of the record at byte {position} is wrong"
                )
            if length > size - position - HEADER - FOOTER:
                raise ValueError(f"{path}: cut off within the record at byte {position}")
            found.append((position + HEADER, length))
            position += HEADER + length + FOOTER
    return np.array(found, np.int64).reshape(-1, 2)


def read(path: pathlib.Path, offset: int, length: int) -> bytes:
    """The payload that `index` has found at this place, its checksum verified.

    Raises:
      ValueError: If the checksum is another.
    """
    # Opened for each read: a thousand shards are more than a process may have open.
    with path.open("rb", buffering=0) as file:
        raw = os.pread(file.fileno(), length + FOOTER, offset)
    if len(raw) != length + FOOTER:
        raise ValueError(f"{path}: cut off within the record at byte {offset - HEADER}")
    payload = raw[:length]
    if masked_crc(payload) != struct.unpack("<I", raw[length:])[0]:
        raise ValueError(f"{path}: the checksum of the record at byte {offset - HEADER} is wrong")
    return payload


def masked_crc(data: bytes) -> int:
    """TFRecord's checksum of some bytes: their CRC-32C, rotated and shifted."""
    crc = google_crc32c.value(data)
    return (((crc >> 15) | (crc << 17)) + _MASK) & 0xFFFFFFFF
