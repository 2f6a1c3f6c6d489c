"""Reads trained weights by name: from workdirs, Orbax checkpoints and safetensors files."""

import pathlib
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from rigl_optax import _paths, export
from rigl_optax.export import _file
from rigl_optax.training import checkpoints, loading

SUFFIX = ".safetensors"


def read_weights(path: str | pathlib.Path, step: str | int = loading.NEWEST) -> dict[str, Any]:
    r"""Reads trained weights from a file or a folder; nothing in it is executed.

    Args:
      path: A workdir of this library, an Orbax checkpoint, or a safetensors file, whether ours
        (`export.write`), or any other.
      step: Of a workdir: as in `training.load`.

    Returns:
      `{name: array}`, for `rigl_optax.start_from`. Names are paths; of a safetensors file of others
      those that it has. A workdir and an export of ours have the names of parameters and of other
      variables, dense; an Orbax checkpoint those of all of its state, as `params/Dense_0/kernel`.

    Raises:
      ValueError: If it is none of these, or cannot be read; one line says why.
      FileNotFoundError: If there is nothing at this path.

    Examples:
      Prunes a checkpoint of Linen to 90 % and trains what is left::

        weights = training.read_weights("checkpoints/1000")
        params = rigl_optax.start_from(params, weights, names={"(.*)": r"params/\1"})
        masks = rigl_optax.magnitude_masks(params, 0.9)
        tx = rigl_optax.static_sparse(optax.sgd(0.01), None, initial_masks=masks)
    """
    place = pathlib.Path(path)
    if not place.exists():
        raise FileNotFoundError(f"{place}: there is no file or folder of weights")
    if place.suffix == SUFFIX:
        return _of_file(place)
    if (place / checkpoints.CONFIG_FILE).is_file():
        run, state = loading.load(place, step)
        trees = run.representation.dense(state), state.model_state
        return {name: x for tree in trees for name, x in _paths.flatten_with_paths(tree)}
    return _of_orbax(place)


def _of_file(place: pathlib.Path) -> dict[str, Any]:
    try:
        arrays, metadata = _file.parse(place.read_bytes())
    except Exception as error:  # a damaged file can raise almost any error
        raise ValueError(f"{place}: not a safetensors file ({error!r})") from error
    if _file.VERSION_KEY not in metadata:
        return dict(arrays)
    found = export.read(place)
    trees = found.params, found.model_state
    return {name: x for tree in trees for name, x in _paths.flatten_with_paths(tree)}


def _of_orbax(place: pathlib.Path) -> dict[str, Any]:
    checkpoints.check_path(place)
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])  # wherever it was written

    def whole(leaf: Any) -> Any:
        is_array = hasattr(leaf, "shape") and hasattr(leaf, "dtype")
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here) if is_array else leaf

    try:
        about = ocp.metadata(place.absolute()).metadata
        tree = ocp.load(place.absolute(), jax.tree.map(whole, about))
    except Exception as error:  # Orbax raises many kinds
        first = (str(error).splitlines() or [type(error).__name__])[0][:300]
        raise ValueError(
            f"{place}: neither a workdir, an Orbax checkpoint nor a {SUFFIX} file ({first})"
        ) from error
    named = _paths.flatten_with_paths(tree)
    return {name: leaf for name, leaf in named if isinstance(leaf, jax.Array)}
