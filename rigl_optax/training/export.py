"""Writes weights and masks of a run into one plain file, which `rigl_optax.export` reads."""

import json
import pathlib

import jax
import numpy as np

from rigl_optax import _paths, condensed
from rigl_optax.export import CONFIG as CONFIG
from rigl_optax.export import Export as Export
from rigl_optax.export import read as read
from rigl_optax.training import files, methods, setup, sparsity
from rigl_optax.training.config import Config, to_json
from rigl_optax.training.state import TrainState, topologies, weight_masks


def write(path: pathlib.Path, config: Config, run: setup.Run, state: TrainState) -> None:
    """Writes the export of a state at once: a reader sees a whole file or none.

    Condensed kernels are written dense, as are masked ones.
    """
    whole = run.placement.compile(run.placement.gather)
    dense = condensed.densify(state.params, topologies(state))
    trees = {"params": dense, "state": state.model_state}
    if methods.find(config).masked:
        sparse = sparsity.distribution(config)(run.shapes)
        named = _paths.flatten_with_paths(weight_masks(state))
        trees["masks"] = {name: mask for name, mask in named if name in sparse}
    arrays = {CONFIG: np.frombuffer(json.dumps(to_json(config)).encode(), np.uint8)}
    for prefix, tree in trees.items():
        for name, leaf in _paths.flatten_with_paths(jax.device_get(whole(tree))):
            arrays[f"{prefix}/{name}"] = np.asarray(leaf)
    with files.replacing(path) as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)
