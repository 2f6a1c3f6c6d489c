"""Leaves that hold a stack of layers along their first axis: measures each layer, and names it."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from rigl_optax import _axes
from rigl_optax._axes import KernelAxes
from rigl_optax.training import sparsity
from rigl_optax.training.setup import Run

PyTree = Any


def paths(run: Run) -> frozenset[str]:
    """Returns the paths of the leaves whose first axis counts layers."""
    return frozenset(sparsity.distribution(run.config).stacked_paths(run.shapes))


def axes_of_layer(path: str, leaf: Any, is_stack: bool) -> KernelAxes:
    """Returns which axes of a layer are inputs and outputs; of a stack, those of one slice."""
    return _axes.default_axes(path, jax.ShapeDtypeStruct(leaf.shape[is_stack:], leaf.dtype))


def for_each_layer(function: Callable[..., PyTree], is_stack: bool) -> Callable[..., PyTree]:
    """Maps a function of one layer over the first axis of its arguments, if that counts layers."""
    return jax.vmap(function) if is_stack else function


def by_layer(found: Mapping[str, PyTree]) -> dict[str, PyTree]:
    """Names what was found out about layers, on the host: `path`, or `path/0`, `path/1` of a stack.

    Args:
      found: `{path: tree}` of NumPy scalars, or of vectors with an entry for each layer of a stack.
    """
    named: dict[str, PyTree] = {}
    for path, tree in found.items():
        if sizes := np.shape(jax.tree.leaves(tree)[0]):
            each = range(sizes[0])
            named |= {f"{path}/{i}": jax.tree.map(lambda x, i=i: x[i], tree) for i in each}
        else:
            named[path] = tree
    return named
