"""Writes weights and masks of a run into one plain file, which `rigl_optax.export` reads."""

import json
import pathlib

import jax
import numpy as np

from rigl_optax import _paths
from rigl_optax.export import CONFIG as CONFIG
from rigl_optax.export import Export as Export
from rigl_optax.export import read as read
from rigl_optax.training import files, setup, sparsity
from rigl_optax.training.config import to_json
from rigl_optax.training.state import TrainState


def write(path: pathlib.Path, run: setup.Run, state: TrainState) -> None:
    """Writes the export of a state at once: a reader sees a whole file or none.

    Condensed kernels are written dense, as are masked ones.
    """
    whole = run.placement.compile(run.placement.gather)
    trees = {"params": run.representation.dense(state), "state": state.model_state}
    if run.method.masked:
        sparse = sparsity.distribution(run.config)(run.shapes)
        named = _paths.flatten_with_paths(run.representation.weight_masks(state))
        trees["masks"] = {name: mask for name, mask in named if name in sparse}
    arrays = {CONFIG: np.frombuffer(json.dumps(to_json(run.config)).encode(), np.uint8)}
    for prefix, tree in trees.items():
        for name, leaf in _paths.flatten_with_paths(jax.device_get(whole(tree))):
            arrays[f"{prefix}/{name}"] = np.asarray(leaf)
    with files.replacing(path) as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)
