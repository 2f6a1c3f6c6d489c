"""Types that stand in signatures, and the words that names and docstrings are made of.

- leaf: one array of params. layer: a leaf, or a slice of a stacked one.
- unit: an output of a layer, with its inputs; its number of active inputs is its fan-in.
- group: weights that are active or inactive together, a block or a single one (`structure=`).
  grid: the groups of a layer as an array.
- ranking: groups that are compared with each other: those of a layer, or of a part of it (N:M).
- mask: which weights are active. dense leaf: one without a mask of its own, all True.
- rewiring: a change of masks that drops some active weights and grows as many inactive ones.
  newborn: a weight that the last rewiring has grown.
- count: how many calls of `update` there were before this one.
- shadow: weights that live on while they are inactive, of methods like Top-KAST and DNW.
- at rest: the optimizer state that `inner.init` gives, as of a weight that has never moved.
"""

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax

PyTree: TypeAlias = Any
Arrays: TypeAlias = list[jax.Array]

# How sparse each layer is: `{path: sparsity}` of the sparse leaves, from params or their shapes.
LayerSparsities: TypeAlias = Callable[[PyTree], Mapping[str, float]]
# What methods take: an overall sparsity, laid out by `erk`, or a distribution like `uniform(0.9)`.
Sparsity: TypeAlias = float | LayerSparsities

# Exceptions for some layers: by pattern of paths, what is different for them.
Overrides: TypeAlias = Mapping[str, Mapping[str, Any]]

Seed: TypeAlias = int | jax.Array
