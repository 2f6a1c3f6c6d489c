"""Reads the weights and masks of a run from one plain file, without Flax.

Use it to deploy a trained network. The file is a NumPy `.npz`, a zip of arrays in which nothing can
be executed. Its arrays are `params/<path>`, `masks/<path>`, `state/<path>` (batch statistics, ...),
and `config`, the run's config as the bytes of a JSON object. A path is the name that `explain`
prints. `scripts/evaluate.py --export` writes the file.
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
    """The contents of an exported file, as NumPy arrays in nested dicts.

    Attributes:
      config: The config of the run, as JSON holds it.
      params: The weights; inactive ones are zero.
      masks: Bool arrays, nested like `params`, of the masked leaves only.
      model_state: Other variables of the model, such as batch statistics.
    """

    config: dict[str, Any]
    params: PyTree
    masks: PyTree
    model_state: PyTree


def read(path: str | os.PathLike[str], max_bytes: int = MAX_BYTES) -> Export:
    """Reads an exported file; nothing in it is executed.

    Args:
      path: The file.
      max_bytes: The most bytes that all arrays may have, unpacked: a small zip may unpack to more
        than the memory holds.

    Returns:
      The contents of the file.

    Raises:
      ValueError: If the file is not an export; the message says why.
      FileNotFoundError: If there is no file.
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
        # A damaged zip can raise almost any error.
        except Exception as error:
            raise ValueError(f"{path}: not an export of a run ({error!r})") from error


def _array(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> np.ndarray:
    """Reads one array, after comparing the size in its header with the bytes that are there."""
    # Else a false header could make NumPy allocate any amount of memory.
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
