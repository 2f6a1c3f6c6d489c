"""Says in words why a leaf is dense."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from rigl_optax import _distributions, _layout, _paths


def find(
    layout: _layout.Layout, distribution: Any, active: Mapping[str, np.ndarray]
) -> dict[str, str]:
    """Gives a reason for each leaf that has no inactive weight.

    Args:
      layout: Layout of params.
      distribution: `erk`, `uniform`, ..., or any `distribution(params) -> {path: sparsity}`.
      active: Number of active weights of each sparse leaf: int64, one entry per layer stacked in
        the leaf.

    Returns:
      `{path: reason}`.
    """
    params = layout.treedef.unflatten(layout.leaves)
    ours = distribution if isinstance(distribution, _distributions.Distribution) else None
    reasons = {}
    for path, leaf in _paths.flatten_with_paths(params):
        if path not in active:
            reasons[path] = _reason_without_mask(path, leaf, ours, params)
        elif active[path].sum() == math.prod(leaf.shape):
            reasons[path] = _reason_all_active(path, leaf, ours, distribution(params), params)
    return reasons


def _reason_without_mask(
    path: str, leaf: Any, ours: _distributions.Distribution | None, params: Any
) -> str:
    if not math.prod(leaf.shape):
        return "no weights"
    if ours is None:
        return "not in the distribution"
    shape = tuple(leaf.shape)[path in ours.stacked_paths(params) :]
    one = jax.ShapeDtypeStruct(shape, leaf.dtype)
    if isinstance(ours.dense, _distributions.DenseLayers):
        reason = ours.dense.reason(path, one, ours.axes)
    elif ours.dense is _distributions.default_dense:
        reason = _distributions.dense_reason(path, one, ours.axes)
    else:
        return "`dense` says so"
    assert reason is not None
    return reason


def _reason_all_active(
    path: str,
    leaf: Any,
    ours: _distributions.Distribution | None,
    targets: Mapping[str, float],
    params: Any,
) -> str:
    if ours is not None:
        own = {layer.path: layer.sparsity for layer in ours.layers(params)}[path]
        if own is not None:
            return f"override of {own:g}"
        if not targets[path] and ours.sparsity:
            return f"{ours.name} would make it denser than dense"
    if targets[path]:
        return f"too small: {targets[path]:.3g} of {math.prod(leaf.shape)} weights is less than one"
    return "sparsity 0"
