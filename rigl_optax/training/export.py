"""Writes weights and masks of a run into one file, which `rigl_optax.export` reads."""

import pathlib

import jax

from rigl_optax import _paths
from rigl_optax.export import Export as Export
from rigl_optax.export import _file
from rigl_optax.export import read as read
from rigl_optax.training import files, setup, sparsity
from rigl_optax.training.config import to_json
from rigl_optax.training.state import TrainState

SUFFIX = ".safetensors"


def write(path: pathlib.Path, run: setup.Run, state: TrainState) -> None:
    """Writes the export of a state at once: a reader sees a whole file or none.

    Condensed kernels are written like masked ones.
    """
    whole = run.placement.compile(run.placement.gather)
    params, model_state = jax.device_get(
        whole((run.representation.dense(state), state.model_state))
    )
    masks = {}
    if run.method.masked:
        sparse = sparsity.distribution(run.config)(run.shapes)
        named = _paths.flatten_with_paths(run.representation.weight_masks(state))
        masks = jax.device_get(whole({name: mask for name, mask in named if name in sparse}))
    with files.replacing(path) as file:
        file.write(_file.serialized(params, masks, model_state, to_json(run.config)))
