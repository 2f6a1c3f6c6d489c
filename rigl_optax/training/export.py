"""Weights and masks of a run in one plain file, for whoever deploys them.

A NumPy `.npz`: an uncompressed or compressed zip of arrays, with nothing in it that executes. Its
arrays are `params/<path>`, `masks/<path>`, `state/<path>` (batch statistics, ...), and `config`,
the run's as the bytes of a JSON object. A path is the name that `explain` prints.
"""

import json
import math
import pathlib
import zipfile
from typing import Any, NamedTuple

import jax
import numpy as np

from rigl_optax import _paths, condensed
from rigl_optax.training import files, methods, setup
from rigl_optax.training.config import Config, to_json
from rigl_optax.training.state import TrainState, topologies, weight_masks

PyTree = Any
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


def write(path: pathlib.Path, config: Config, run: setup.Run, state: TrainState) -> None:
    """Writes the export of a state at once: a reader sees a whole file or none.

    Condensed kernels are written dense, as are masked ones.
    """
    whole = run.placement.compile(run.placement.gather)
    dense = condensed.densify(state.params, topologies(state))
    trees = {"params": dense, "state": state.model_state}
    if methods.find(config).masked:
        sparse = methods.distribution(config)(run.shapes)
        named = _paths.flatten_with_paths(weight_masks(state))
        trees["masks"] = {name: mask for name, mask in named if name in sparse}
    arrays = {CONFIG: np.frombuffer(json.dumps(to_json(config)).encode(), np.uint8)}
    for prefix, tree in trees.items():
        for name, leaf in _paths.flatten_with_paths(jax.device_get(whole(tree))):
            arrays[f"{prefix}/{name}"] = np.asarray(leaf)
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)
    temporary.replace(path)


def read(path: pathlib.Path, max_bytes: int = MAX_BYTES) -> Export:
    """Reads what `write` wrote; nothing in it is executed, whatever it holds.

    Args:
      path: The file.
      max_bytes: Of all arrays, unpacked: a small file may unpack to more than the memory holds.

    Raises:
      ValueError: If the file is not such an export; it says why.
      FileNotFoundError: If there is none.
    """
    with path.open("rb") as file:
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
    config = files.parse(arrays.pop(CONFIG).tobytes().decode(), {})
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
