"""Begins a run from weights that were trained before, by `config.start`."""

import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx

import rigl_optax
from rigl_optax import _paths, _start
from rigl_optax.methods import saliency
from rigl_optax.training import checkpoints, methods
from rigl_optax.training.config import Config

PyTree = Any
Weights = dict[str, np.ndarray]  # by path
_READ = (nnx.Param, nnx.BatchStat)  # kinds of variables that are trained


def read(config: Config, model: nnx.Module) -> Weights:
    """Reads the weights of `config.start`, for the parameters and batch statistics of a model.

    Args:
      config: Of the run.
      model: Its model, or the shapes of one.

    Returns:
      Arrays of the model's shapes and dtypes, by path, without those that `config.start.keep`
      leaves as they are.

    Raises:
      ValueError: If the file cannot be read, or weights are missing, have another shape or are not
        finite; it lists all of them.
      FileNotFoundError: If it is not there.
    """
    from rigl_optax.training import loading, weights  # which need runs in turn

    section = config.start
    is_workdir = (pathlib.Path(section.path) / checkpoints.CONFIG_FILE).is_file()
    if section.step != loading.NEWEST and not is_workdir:
        raise ValueError(
            f"config.start.step={section.step!r}: must be {loading.NEWEST!r}, for "
            f"config.start.path={section.path!r} is no workdir of this library"
        )
    shapes = {
        path: leaf
        for kind in _READ
        for path, leaf in _paths.flatten_with_paths(nnx.to_pure_dict(nnx.state(model, kind)))
    }
    try:
        kept = _start.matching(list(shapes), section.keep, "keep")
        wanted = {path: leaf for path, leaf in shapes.items() if path not in kept}
        found = rigl_optax.start_from(
            wanted,
            weights.read_weights(section.path, section.step),
            names=dict(section.names),
            convert=_from_pytorch if section.layout == "pytorch" else None,
        )
    except FileNotFoundError as error:
        raise FileNotFoundError(f"config.start.path={section.path!r}: {error}") from None
    except ValueError as error:
        raise ValueError(f"config.start.path={section.path!r}: {error}") from None
    return {path: np.asarray(x) for path, x in found.items()}


def filled(make_model: Callable[[], nnx.Module], weights: PyTree) -> nnx.Module:
    """Makes a model with these weights, which `read` has found; may be traced."""
    model = make_model()
    for kind in _READ:
        state = nnx.to_pure_dict(nnx.state(model, kind))
        nnx.update(model, _paths.map_with_names(lambda path, x: weights.get(path, x), state))
    return model


def largest(
    config: Config, tx: Any, make_model: Callable[[], nnx.Module], weights: Weights
) -> PyTree | None:
    """Returns masks of the largest weights, as many as a method begins with; None if with all.

    Args:
      config: Of the run.
      tx: The method, as `methods.build` makes it.
      make_model: Makes the model.
      weights: From `read`.
    """

    @jax.jit
    def start(weights: Weights) -> PyTree:
        return nnx.to_pure_dict(nnx.state(filled(make_model, weights), nnx.Param))

    params = start(weights)
    design = methods.design(config, tx, params)
    if design is None:
        return None
    first = design.layouts(params).first
    return saliency.largest(first) if any(leaf.zeros for leaf in first.sparse) else None


def _from_pytorch(path: str, x: np.ndarray) -> np.ndarray:
    """Turns a kernel of PyTorch, (out, in, *window), into one of Flax, (*window, in, out)."""
    is_kernel = path.rpartition("/")[2] == "kernel"
    return x.transpose(*range(2, x.ndim), 1, 0) if is_kernel and x.ndim >= 2 else x
