"""Reads TFRecord files in random order, without TensorFlow: a file is indexed once.

A record is the length of its payload (8 bytes, little-endian), a checksum of those 8 bytes (4), the
payload, and a checksum of the payload (4). Checksums are CRC-32C, masked as TFRecord does.
"""

import os
import pathlib
import struct

import numpy as np

from rigl_optax.data import extras

HEADER, FOOTER = 12, 4  # bytes before and after a payload
_MASK = 0xA282EAD8


def index(path: pathlib.Path) -> np.ndarray:
    """Finds all payloads of a file; reads only the headers, and verifies their checksums.

    Returns:
      int64 (records, 2), offset and length of each payload in bytes.

    Raises:
      ValueError: If the file is cut off within a record, or a header is damaged, so that the
        records after it cannot be found.
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
    """Reads a payload that `index` has found, and verifies its checksum.

    Raises:
      ValueError: If the checksum is wrong, or the file is cut off.
    """
    # Opened for each read: a process may not have all of a thousand shards open.
    with path.open("rb", buffering=0) as file:
        raw = os.pread(file.fileno(), length + FOOTER, offset)
    if len(raw) != length + FOOTER:
        raise ValueError(f"{path}: cut off within the record at byte {offset - HEADER}")
    payload = raw[:length]
    if masked_crc(payload) != struct.unpack("<I", raw[length:])[0]:
        raise ValueError(f"{path}: the checksum of the record at byte {offset - HEADER} is wrong")
    return payload


def masked_crc(data: bytes) -> int:
    """Computes TFRecord's checksum: the CRC-32C, rotated by 15 bits and plus a constant."""
    crc = extras.load("google_crc32c", "tfds").value(data)
    return (((crc >> 15) | (crc << 17)) + _MASK) & 0xFFFFFFFF
