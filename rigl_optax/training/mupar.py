"""Sparse muPar in a run: rates and initial values by width and density, if the config asks."""

import math
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

import rigl_optax
from rigl_optax.training import architectures, methods, sparsity
from rigl_optax.training.config import Config

PyTree = Any


def factors(config: Config, shapes: PyTree) -> PyTree | None:
    """Returns what multiplies the rate of each leaf: a tree of floats; None without `base_width`.

    Args:
      config: The run's.
      shapes: Of the dense parameters.

    Raises:
      ValueError: If the model is no transformer.
    """
    base = config.optimizer.base_width
    if not base:
        return None
    if config.model.name not in architectures.TRANSFORMERS:
        raise ValueError(
            f"config.optimizer.base_width={base}: must be 0 for {config.model.name}; it is for "
            f"{' and '.join(architectures.TRANSFORMERS)}, whose kernels have one initial spread"
        )
    width = shapes["norm"]["scale"].shape[0] / base
    first = _sparsities(config, shapes)
    return rigl_optax.mupar_factors(shapes, lambda params: first, width)


def initialised(make_model: Callable[[], nnx.Module], factors: PyTree | None) -> nnx.Module:
    """Makes a model, and multiplies its parameters by the square roots of the factors."""
    model = make_model()
    if factors is not None:
        params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
        nnx.update(model, jax.tree.map(lambda w, f: w * math.sqrt(f), params, factors))
    return model


def _sparsities(config: Config, shapes: PyTree) -> dict[str, float]:
    """The sparsity at step 0 of each leaf that may be sparse, by path."""
    found = dict.fromkeys(sparsity.distribution(config)(shapes), 0.0)
    design = methods.design(config, methods.build(config), shapes)
    if design is not None:
        for leaf in design.layouts(shapes).first.sparse:
            assert leaf.zeros is not None
            found[leaf.path] = leaf.zeros * leaf.rankings / math.prod(leaf.grid)
    return found
