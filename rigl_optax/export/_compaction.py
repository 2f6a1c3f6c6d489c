"""Removes units that are not read or never change: a smaller dense network, the same outputs."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from rigl_optax import _paths
from rigl_optax._types import PyTree
from rigl_optax.export._units import Units


class Compacted(NamedTuple):
    """A network without the units that do nothing.

    Attributes:
      params: The parameters, smaller arrays in a tree like before.
      model_state: Other variables, likewise.
      units: `{name of a group: (units before, units now)}`; a group is named after the layer that
        makes it first. Groups in which all units stay by definition (inputs, outputs, what is
        normalised together) are left out.
      kept: `{(path, axis): int array}`: the entries along an axis that are still there.
    """

    params: PyTree
    model_state: PyTree
    units: dict[str, tuple[int, int]]
    kept: dict[tuple[str, int], np.ndarray]

    def cut(self, tree: PyTree) -> PyTree:
        """Cuts other arrays of the same paths, such as masks, down to the units that are left."""
        return _paths.map_with_names(lambda path, x: _cut(self.kept, path, np.asarray(x)), tree)


def compact(
    params: PyTree, describe: Callable[[Units], None], model_state: PyTree | None = None
) -> Compacted:
    """Removes units without outputs, and those without inputs, with all that belongs to them.

    A unit goes if nothing that reaches the outputs reads it, or if it gives the same number for
    every input and that number is 0 or can be added to what reads it: to its bias, or to the mean
    of the batch normalisation after it. Outputs in evaluation stay the same, up to the rounding of
    sums. Before a window that is padded with zeros only a constant of 0 can go. Of a layer without
    any unit left one stays, cut off. Where many weights are exactly zero this is a smaller dense
    network; which of them are masked plays no role.

    The reference's `get_compressed_fc` looks at each layer of an MLP once; this goes on until
    nothing changes (Evci et al., 2020, appendix B).

    Args:
      params: Parameters, a tree of arrays; inactive weights are zero.
      describe: Walks through the network by the methods of `Units`, in the order of its forward
        pass. Models of this library do that in their method `units`.
      model_state: Other variables, such as the running statistics of batch normalisation.

    Returns:
      The smaller network.

    Raises:
      ValueError: If the description names arrays that are not there, or do not fit together.

    Examples:
      >>> kernel = np.array([[1.0, 0, 0, 2], [1, 0, 3, 0]])  # unit 1 has no inputs
      >>> params = {
      ...     "a": {"kernel": kernel, "bias": np.array([0.0, 5, 0, 0])},
      ...     "b": {"kernel": np.array([[1.0], [2], [0], [4]]), "bias": np.zeros(1)},  # 2 is unread
      ... }
      >>> def describe(units):
      ...     hidden = units.relu(units.layer(units.inputs(2), "a"))
      ...     units.outputs(units.layer(hidden, "b"))
      >>> small = compact(params, describe)
      >>> small.params["a"]["kernel"].tolist(), small.params["b"]["bias"].tolist(), small.units
      ([[1.0, 2.0], [1.0, 0.0]], [10.0], {'a': (4, 2)})
    """
    model_state = {} if model_state is None else model_state
    named = [*_paths.flatten_with_paths(params), *_paths.flatten_with_paths(model_state)]
    leaves = {path: np.asarray(leaf) for path, leaf in named}
    if len(leaves) < len(named):
        raise ValueError("params and model_state have a path in common")
    units = Units(leaves)
    describe(units)
    return _removed(params, model_state, units, leaves)


def _removed(
    params: PyTree, model_state: PyTree, units: Units, leaves: dict[str, np.ndarray]
) -> Compacted:
    fixed = {units.group(g) for g in units.fixed}
    sizes = dict(zip(units.groups(), units.sizes(), strict=True))
    links = [read.links(leaves[read.path]) for read in units.reads]
    edges = [
        (read, joined, units.group(read.source), units.group(read.target))
        for read, joined in zip(units.reads, links, strict=True)
    ]
    constant = {g: np.full(n, g not in fixed) for g, n in sizes.items()}
    for read, joined, source, _ in edges:
        constant[source] &= read.absorbs() | ~joined.any(1)
    # From the outputs backwards: a cycle of units that only read each other is never reached.
    live = {g: np.full(n, g in fixed) for g, n in sizes.items()}
    changed = True
    while changed:
        changed = False
        for _, joined, source, target in edges:
            reached = joined[:, live[target]].any(1) & ~constant[source]
            changed |= bool((reached & ~live[source]).any())
            live[source] |= reached
    moved = dict(leaves)
    for read, joined, source, _ in edges:
        gone = constant[source] & joined.any(1) & (read.values != 0)
        if not gone.any() or read.shift is None:
            continue
        wide = np.repeat(np.where(gone, read.values, 0.0), read.inputs[1].shape[1])
        total = read.shift.sign * (wide @ read.matrix(leaves[read.path]))
        _add(moved, read.shift.path, read.shift.start, total)
    for read, _, source, _ in edges:
        if not live[source].any():
            # A placeholder, so that no axis is empty: nothing may come from it.
            kernel = moved[read.path] = moved[read.path].copy()
            np.moveaxis(kernel, read.inputs[0], 0)[read.inputs[1][0]] = 0
    for alive in live.values():
        if not alive.any():
            alive[:1] = True
    kept = {}
    for (path, axis), (group, places) in units.places.items():
        kept[path, axis] = np.sort(places[live[units.group(group)]].reshape(-1))
    counts = {units.name(g): (n, int(live[g].sum())) for g, n in sizes.items() if g not in fixed}

    def smaller(path: str, leaf: Any) -> np.ndarray:
        del leaf
        return _cut(kept, path, moved[path])

    small = _paths.map_with_names(smaller, params), _paths.map_with_names(smaller, model_state)
    return Compacted(*small, counts, kept)


def _add(leaves: dict[str, np.ndarray], path: str, start: int, total: np.ndarray) -> None:
    flat = leaves[path].reshape(-1).astype(np.float64)
    flat[start : start + len(total)] += total
    leaves[path] = flat.astype(leaves[path].dtype).reshape(leaves[path].shape)


def _cut(kept: dict[tuple[str, int], np.ndarray], path: str, leaf: np.ndarray) -> np.ndarray:
    for axis in range(leaf.ndim):
        if (path, axis) in kept:
            leaf = np.take(leaf, kept[path, axis], axis)
    return leaf
