"""Writes weights and masks into one safetensors file, and reads them back.

`docs/deploy.md` writes the format down, with readers of it in plain NumPy and in PyTorch.
"""

import json
import math
import os
import pathlib
from collections.abc import Mapping
from types import ModuleType
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from rigl_optax import _masks, _paths
from rigl_optax._types import PyTree

VERSION = "1"
MAX_BYTES = 16 * 2**30
# Keys of the metadata.
VERSION_KEY = "rigl_optax"
_SHAPES, _CONFIG = "shapes", "config"
_INDEX = np.dtype(np.int32)
# Names of dtypes in the file.
_DTYPES = {
    "BOOL": np.dtype(bool),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "I32": np.dtype(np.int32),
    "U32": np.dtype(np.uint32),
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
}


class Export(NamedTuple):
    """The contents of an exported file, as NumPy arrays in nested dicts.

    Attributes:
      config: The config of the run, as JSON holds it; empty if there was none.
      params: The weights; inactive ones are zero.
      masks: Bool arrays, nested like `params`, of the leaves that were given masks.
      model_state: Other variables of the model, such as batch statistics.
    """

    config: dict[str, Any]
    params: PyTree
    masks: PyTree
    model_state: PyTree


def write(
    path: str | os.PathLike[str],
    params: PyTree,
    masks: PyTree,
    *,
    model_state: PyTree | None = None,
    config: Mapping[str, Any] | None = None,
) -> None:
    """Writes a sparse network into a safetensors file: active weights, and where they are.

    Each mask takes a bit a weight, or an int32 index for each active weight where that is smaller
    (below a density of 1/32). `read` reads the file.

    Args:
      path: The file; it is overwritten.
      params: Parameters, a tree of arrays.
      masks: Bool tree like params (`get_masks`), or of some of its leaves. Leaves with a full mask,
        or none, are written dense.
      model_state: Other variables of the model, such as batch statistics; a tree of arrays.
      config: Any JSON object, to be kept beside the weights.

    Raises:
      ValueError: If masks do not fit params, an inactive weight is not zero, or a dtype is none of
        those that the file can hold.
      ImportError: If `safetensors` is not installed.

    Examples:
      >>> import pathlib, tempfile
      >>> params = {"kernel": np.eye(8, dtype=np.float32), "bias": np.ones(8, np.float32)}
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = pathlib.Path(folder) / "network.safetensors"
      ...     write(path, params, {"kernel": params["kernel"] != 0})
      ...     found = read(path)
      >>> int(found.masks["kernel"].sum()), bool((found.params["kernel"] == np.eye(8)).all())
      (8, True)
    """
    pathlib.Path(path).write_bytes(serialized(params, masks, model_state, config))


def serialized(
    params: PyTree,
    masks: PyTree,
    model_state: PyTree | None = None,
    config: Mapping[str, Any] | None = None,
) -> bytes:
    """Returns the bytes of the file that `write` writes."""
    weights = {name: np.asarray(leaf) for name, leaf in _paths.flatten_with_paths(params)}
    paths = list(weights)
    found = _masks.of_params(masks, paths, list(weights.values()), allow_missing=True)
    given = _masks.over_paths(masks, paths, allow_missing=True)
    arrays, shapes = {}, {}
    for name, leaf in weights.items():
        mask = np.asarray(found[name])
        if given[name] is not None:
            shapes[name] = list(leaf.shape)
        if mask.all():
            arrays[f"params/{name}"] = leaf
            continue
        if np.any(leaf[~mask]):
            raise ValueError(
                f"params: inactive weights of {name!r} are not zero; pass "
                "rigl_optax.apply_masks(params, opt_state)"
            )
        arrays[f"params/{name}"] = leaf[mask]
        kind = _place_kind(leaf.size, int(mask.sum()))
        arrays[f"{kind}/{name}"] = _pack(mask, kind)
    for name, leaf in _paths.flatten_with_paths(model_state or {}):
        arrays[f"state/{name}"] = np.asarray(leaf)
    allowed = set(_DTYPES.values())
    wrong = [f"{n} ({x.dtype})" for n, x in arrays.items() if x.dtype not in allowed]
    if wrong:
        raise ValueError(f"dtypes must be of {', '.join(map(str, allowed))}; not {wrong}")
    metadata = {
        VERSION_KEY: VERSION,
        _SHAPES: json.dumps(shapes),
        _CONFIG: json.dumps(dict(config or {}), allow_nan=False),
    }
    arrays = {name: np.ascontiguousarray(x).reshape(x.shape) for name, x in arrays.items()}
    return _safetensors().numpy.save(arrays, metadata)


def read(path: str | os.PathLike[str], max_bytes: int = MAX_BYTES) -> Export:
    """Reads an exported file; nothing in it is executed.

    Args:
      path: The file.
      max_bytes: The most bytes that all arrays may have, unpacked: a small file may unpack to more
        than the memory holds.

    Returns:
      The contents of the file, sparse weights unpacked to dense arrays.

    Raises:
      ValueError: If the file is not an export; the message says why.
      FileNotFoundError: If there is no file.
      ImportError: If `safetensors` is not installed.
    """
    _safetensors()
    with pathlib.Path(path).open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > max_bytes:
            raise ValueError(f"{path}: it has {size:,} bytes, more than {max_bytes=:,}")
        data = file.read()
    try:
        return _unpacked(*parse(data), max_bytes)
    # A damaged file can raise almost any error.
    except Exception as error:
        raise ValueError(f"{path}: not an export of a run ({error!r})") from error


def parse(data: bytes) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Returns the arrays and the metadata of any safetensors file, as it stores them.

    Raises:
      Exception: Of any kind, if the bytes are not such a file.
    """
    tensors = _safetensors().deserialize(data)  # checks the header, and sizes against bytes
    length = int.from_bytes(data[:8], "little")
    metadata = json.loads(data[8 : 8 + length]).get("__metadata__", {})
    arrays = {}
    for name, tensor in tensors:
        if tensor["dtype"] not in _DTYPES:
            raise ValueError(f"{name} is of dtype {tensor['dtype']}, not of {', '.join(_DTYPES)}")
        flat = np.frombuffer(tensor["data"], _DTYPES[tensor["dtype"]])
        arrays[name] = flat.reshape(tensor["shape"])
    return arrays, metadata


def _unpacked(arrays: dict[str, np.ndarray], metadata: dict[str, str], max_bytes: int) -> Export:
    if metadata.get(VERSION_KEY) != VERSION:
        raise ValueError(f"its metadata have no {VERSION_KEY!r} of {VERSION!r}")
    config, shapes = json.loads(metadata[_CONFIG]), _shapes(metadata[_SHAPES])
    if not isinstance(config, dict):
        raise ValueError(f"{_CONFIG} is no JSON object")
    trees: dict[str, dict[str, np.ndarray]] = {"params": {}, "bits": {}, "indices": {}, "state": {}}
    for full, array in arrays.items():
        kind, _, name = full.partition("/")
        if kind not in trees or not name:
            raise ValueError(f"{full!r} is none of {', '.join(trees)}")
        trees[kind][name] = array
    weights, masks = trees["params"], {}
    placed = sorted([*trees["bits"], *trees["indices"]])
    if len(set(placed)) < len(placed) or not set(placed) <= set(shapes) <= set(weights):
        raise ValueError(f"masks of {placed}, but shapes of {sorted(shapes)}")
    sizes = {n: math.prod(shapes[n]) if n in shapes else x.size for n, x in weights.items()}
    total = sum(size * weights[n].dtype.itemsize for n, size in sizes.items())
    total += sum(sizes[n] for n in shapes)  # a mask has a byte a weight
    if total > max_bytes:
        raise ValueError(f"it unpacks to {total:,} bytes, more than {max_bytes=:,}")
    for name, shape in shapes.items():
        if name not in placed:
            if weights[name].shape != shape:
                raise ValueError(f"{name!r} has shape {weights[name].shape}, not {shape}")
            masks[name] = np.ones(shape, bool)
            continue
        kind = "bits" if name in trees["bits"] else "indices"
        mask = _unpack(trees[kind][name], kind, sizes[name], name)
        values = weights[name]
        if values.shape != (int(mask.sum()),):
            raise ValueError(f"{name!r}: {values.shape} values, {int(mask.sum())} active weights")
        dense = np.zeros(sizes[name], values.dtype)
        dense[mask] = values
        weights[name], masks[name] = dense.reshape(shape), mask.reshape(shape)
    return Export(config, *map(nested, (weights, masks, trees["state"])))


def _shapes(text: str) -> dict[str, tuple[int, ...]]:
    found = json.loads(text)
    for name, shape in found.items():
        if not isinstance(shape, list) or any(type(n) is not int or n < 0 for n in shape):
            raise ValueError(f"{_SHAPES}: {shape} of {name!r} is no shape")
    return {name: tuple(shape) for name, shape in found.items()}


def _place_kind(size: int, active: int) -> str:
    """Chooses the smaller of a bit a weight and an index for each active weight."""
    return "indices" if active * _INDEX.itemsize < math.ceil(size / 8) else "bits"


def _pack(mask: np.ndarray, kind: str) -> np.ndarray:
    if kind == "bits":
        return np.packbits(mask.reshape(-1), bitorder="little")
    return np.flatnonzero(mask).astype(_INDEX)


def _unpack(packed: np.ndarray, kind: str, size: int, name: str) -> np.ndarray:
    """Returns a flat bool array, after checking that the place of every weight is plain."""
    if kind == "bits":
        if packed.dtype != np.uint8 or packed.shape != (math.ceil(size / 8),):
            raise ValueError(f"bits/{name}: {packed.shape} {packed.dtype} for {size} weights")
        bits = np.unpackbits(packed, bitorder="little").astype(bool)
        if bits[size:].any():
            raise ValueError(f"bits/{name}: bits beyond the last weight are set")
        return bits[:size]
    if packed.dtype != _INDEX or packed.ndim != 1:
        raise ValueError(f"indices/{name}: {packed.ndim} axes of {packed.dtype}")
    inside = not packed.size or (packed[0] >= 0 and packed[-1] < size)
    if not inside or np.any(np.diff(packed.astype(np.int64)) <= 0):
        raise ValueError(f"indices/{name}: they do not ascend from 0 to {size - 1}")
    mask = np.zeros(size, bool)
    mask[packed] = True
    return mask


def nested(named: Mapping[str, Any]) -> dict[str, Any]:
    """Makes nested dicts from names like `layers/0/kernel`.

    Raises:
      ValueError: If a name is also the beginning of another.
    """
    tree: dict[str, Any] = {}
    for name, leaf in named.items():
        *above, last = name.split("/")
        node = tree
        for key in above:
            node = node.setdefault(key, {})
            if not isinstance(node, dict):
                raise ValueError(f"{name!r} is below another leaf")
        if last in node:
            raise ValueError(f"{name!r} is above another leaf")
        node[last] = leaf
    return tree


def _safetensors() -> ModuleType:
    try:
        import safetensors
        import safetensors.numpy
    except ImportError as error:
        raise ImportError(
            f"{error}: safetensors files need it; pip install 'rigl-optax[export]'"
        ) from None
    return safetensors
