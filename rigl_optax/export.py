"""Weights and masks of a run in one plain file, for whoever deploys them: no Flax is needed.

A NumPy `.npz`: an uncompressed or compressed zip of arrays, with nothing in it that executes. Its
arrays are `params/<path>`, `masks/<path>`, `state/<path>` (batch statistics, ...), and `config`,
the run's as the bytes of a JSON object. A path is the name that `explain` prints.
`scripts/evaluate.py --export` writes it.
"""

import json
import math
import os
import pathlib
import zipfile
from typing import Any, NamedTuple

import numpy as np

from rigl_optax._types import PyTree

CONFIG = "config"
MAX_BYTES = 16 * 2**30
_DTYPES = ("bool", "uint8", "int32", "uint32", "float16", "float32", "float64")


class Export(NamedTuple):
    """What an exported file holds, as NumPy arrays in nested dicts.

    Attributes:
      config: Of the run, as JSON holds it.
      params: The weights; inactive ones are zero.
      masks: Bool, like `params` but of its masked leaves only.
      model_state: What else the model carries.
    """

    config: dict[str, Any]
    params: PyTree
    masks: PyTree
    model_state: PyTree


def read(path: str | os.PathLike[str], max_bytes: int = MAX_BYTES) -> Export:
    """Reads an export; nothing in it is executed, whatever it holds.

    Args:
      path: The file.
      max_bytes: Of all arrays, unpacked: a small file may unpack to more than the memory holds.

    Raises:
      ValueError: If the file is not such an export; it says why.
      FileNotFoundError: If there is none.
    """
    with pathlib.Path(path).open("rb") as file:
        try:
            with zipfile.ZipFile(file) as archive:
                members = archive.infolist()
                size = sum(member.file_size for member in members)
                if size > max_bytes:
                    raise ValueError(f"it unpacks to {size:,} bytes, more than {max_bytes=:,}")
                found = {x.filename.removesuffix(".npy"): _array(archive, x) for x in members}
            return _checked(found)
        # A mutated zip can raise almost anything: all of it means the same.
        except Exception as error:
            raise ValueError(f"{path}: not an export of a run ({error!r})") from error


def _array(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> np.ndarray:
    """One array, whose header is not trusted before its size has been compared."""
    with archive.open(info) as member:
        np.lib.format.read_magic(member)
        shape, _, dtype = np.lib.format.read_array_header_1_0(member)
        if dtype.name not in _DTYPES:
            raise ValueError(f"{info.filename} is of dtype {dtype}, not {', '.join(_DTYPES)}")
        if member.tell() + math.prod(shape) * dtype.itemsize != info.file_size:
            raise ValueError(f"{info.filename} has not the bytes of {shape} {dtype}")
    with archive.open(info) as member:
        return np.lib.format.read_array(member, allow_pickle=False)


def _checked(arrays: dict[str, np.ndarray]) -> Export:
    config = json.loads(arrays.pop(CONFIG).tobytes().decode())
    if not isinstance(config, dict):
        raise ValueError(f"{CONFIG} is no JSON object")
    trees: dict[str, PyTree] = {"params": {}, "masks": {}, "state": {}}
    for name, array in arrays.items():
        kind, *keys = name.split("/")
        if kind not in trees or not keys:
            raise ValueError(f"{name!r} is none of {', '.join(trees)}")
        node = trees[kind]
        for key in keys[:-1]:
            node = node.setdefault(key, {})
        node[keys[-1]] = array
        if kind == "masks":
            weights = arrays.get("/".join(["params", *keys]))
            if weights is None or weights.shape != array.shape or array.dtype != bool:
                raise ValueError(f"{name!r} is no mask of a weight")
            if np.any(weights[~array]):
                raise ValueError(f"{name!r}: inactive weights are not zero")
    return Export(config, trees["params"], trees["masks"], trees["state"])
