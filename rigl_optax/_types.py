"""Types used in signatures, and the words used in names and docstrings.

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
- at rest: the optimizer state of a weight that has never moved, as `inner.init` makes it.
"""

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax

PyTree: TypeAlias = Any
Arrays: TypeAlias = list[jax.Array]

# `distribution(params) -> {path: sparsity}` of the sparse leaves, from params or their shapes.
LayerSparsities: TypeAlias = Callable[[PyTree], Mapping[str, float]]
# The argument of methods: an overall sparsity, laid out by `erk`, or a distribution like
# `uniform(0.9)`.
Sparsity: TypeAlias = float | LayerSparsities

# `{pattern: {argument: value}}`: other arguments for the layers whose paths match.
Overrides: TypeAlias = Mapping[str, Mapping[str, Any]]

Seed: TypeAlias = int | jax.Array
