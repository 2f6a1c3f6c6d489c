"""Converts dense parameters with masks to condensed weights with topologies, and back.

Condensed weights are a tree like params in which the values of stored blocks, or of single weights,
take the place of sparse kernels: plain arrays, for any optimizer. A second mapping, `{path:
topology}`, says where they are.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rigl_optax import _axes, _masks, _paths, _structures
from rigl_optax._structures import UNSTRUCTURED, Structures
from rigl_optax._types import PyTree
from rigl_optax._wrapper import _inner_state
from rigl_optax.condensed import _kinds
from rigl_optax.condensed._topology import Topology
from rigl_optax.condensed.single._csr_topology import CSRTopology

Topologies = Mapping[str, Topology]


def condense(
    params: PyTree,
    masks: PyTree,
    structure: Structures,
    *,
    axes: _axes.Axes = _axes.default_axes,
) -> tuple[PyTree, dict[str, Topology]]:
    """Stores the active blocks, or single weights, of dense parameters.

    Args:
      params: Parameters, dense.
      masks: Bool tree like params (`get_masks`), or of some of its leaves (`export.read`).
        Kernels with a full mask, or none, stay dense.
      structure: The structure that they were trained with: a `Block`, `Unstructured()`, or a
        mapping from patterns of paths to these.
      axes: As in `uniform`. Only kernels (*window, in, out) can be condensed: others are refused.

    Returns:
      Weights, a tree like params, and `{path: topology}` of the condensed kernels.

    Raises:
      ValueError: If masks do not belong to params, or are not made of whole blocks; if a layer has
        another structure or layout, or single weights in a kernel that has not two axes.

    Examples:
      >>> import jax.numpy as jnp, numpy as np, rigl_optax
      >>> from rigl_optax.condensed import condense, densify
      >>> params = {"kernel": jnp.ones((4, 6)), "bias": jnp.ones(6)}
      >>> masks = {"kernel": np.arange(6) // 3 + np.zeros((4, 1)) > 0, "bias": np.ones(6, bool)}
      >>> weights, topologies = condense(params, masks, rigl_optax.Block(2, 3))
      >>> weights["kernel"].shape, densify(weights, topologies)["kernel"].sum().item()
      ((2, 2, 3), 12.0)
    """
    _structures.check(structure)
    partial = _partial(params, masks, axes)
    structures = _structures.by_path(structure, list(partial)) if partial else {}
    topologies: dict[str, Topology] = {}
    for path, mask in partial.items():
        kind = _kinds.kind(structures[path], repr(path))
        topologies[path] = kind.from_mask(mask, structures[path], path)
    return extract(params, topologies), topologies


def condense_csr(
    params: PyTree, masks: PyTree, *, axes: _axes.Axes = _axes.default_axes
) -> tuple[PyTree, dict[str, CSRTopology]]:
    """Stores the single active weights of dense parameters, whatever structure they have.

    Args:
      params: Parameters, dense.
      masks: Bool tree like params (`get_masks`), or of some of its leaves (`export.read`).
        Leaves with a full mask, or none, stay dense.
      axes: As in `condense`.

    Returns:
      Weights, a tree like params with a vector of values for each sparse kernel, and
      `{path: topology}` of these.

    Raises:
      ValueError: If masks do not belong to params; if a leaf that is not a kernel (in, out) has a
        mask that is not full.

    Examples:
      >>> import jax.numpy as jnp, numpy as np
      >>> from rigl_optax.condensed import bind, condense_csr
      >>> params = {"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4)}
      >>> masks = {"kernel": np.eye(4, dtype=bool), "bias": np.ones(4, bool)}
      >>> weights, topologies = condense_csr(params, masks)
      >>> kernels = bind(weights, topologies)
      >>> weights["kernel"].shape, (jnp.ones((2, 4)) @ kernels["kernel"] + kernels["bias"]).shape
      ((4,), (2, 4))
    """
    topologies = {
        path: CSRTopology.from_mask(mask, UNSTRUCTURED, path)
        for path, mask in _partial(params, masks, axes).items()
    }
    return extract(params, topologies), topologies


def _partial(params: PyTree, masks: PyTree, axes: _axes.Axes) -> dict[str, Any]:
    """Returns the masks that are not full, by path.

    Raises:
      ValueError: If masks do not belong to params, or a leaf is not laid out (*window, in, out).
    """
    named = _paths.flatten_with_paths(params)
    paths, leaves = [path for path, _ in named], [leaf for _, leaf in named]
    found = _masks.of_params(masks, paths, leaves, allow_missing=True)
    partial = {path: found[path] for path in paths if not np.all(np.asarray(found[path]))}
    for path, leaf in named:
        if path not in partial:
            continue
        layout = _axes.find(axes, path, leaf)
        if _axes.unusual(layout, len(leaf.shape)) is not None:
            raise ValueError(
                f"{path!r} of shape {tuple(leaf.shape)} has its inputs along {layout.inputs} and "
                f"outputs along {layout.outputs}; only kernels (*window, in, out) can be "
                "condensed: transpose its weights and mask, or pass axes=rigl_optax.flax_axes if "
                "they are laid out so"
            )
    return partial


def extract(params: PyTree, topologies: Topologies) -> PyTree:
    """Takes the stored entries out of dense parameters, which need not be zero elsewhere.

    Args:
      params: Parameters, dense.
      topologies: `{path: topology}` of the kernels to condense.

    Returns:
      Weights: a tree like params.

    Raises:
      ValueError: If a topology has no leaf of its shape.
    """
    named = _paths.flatten_with_paths(params)
    shapes = {path: tuple(leaf.shape) for path, leaf in named}
    for path, topology in topologies.items():
        if shapes.get(path) != topology.shape:
            raise ValueError(
                f"topology of {path!r}, of shape {topology.shape}, has no such leaf; leaves are "
                f"{', '.join(f'{p} {shape}' for p, shape in shapes.items())}"
            )
    leaves = [topologies[p].extract(x) if p in topologies else x for p, x in named]
    return jax.tree.unflatten(jax.tree.structure(params), leaves)


def densify(weights: PyTree, topologies: Topologies) -> PyTree:
    """Makes dense parameters, zero where nothing is stored.

    Args:
      weights: Condensed weights, or a tree like them, such as their average.
      topologies: `{path: topology}` of the weights.

    Returns:
      A tree of the same structure.

    Raises:
      ValueError: If a topology has no leaf of its shape.
    """
    return _map(
        weights, topologies, lambda path, x: topologies[path].bind(x).dense(), lambda _, x: x
    )


def masks_of(weights: PyTree, topologies: Topologies) -> PyTree:
    """Makes the masks of the dense parameters: bool arrays, all True for dense leaves."""
    return _map(
        weights,
        topologies,
        lambda path, _: topologies[path].dense_mask(),
        lambda _, x: jnp.ones(jnp.shape(x), bool),
    )


def bind(
    weights: PyTree, topologies: Topologies, probes: Mapping[str, Any] | None = None
) -> PyTree:
    """Puts a `BlockSparse` or `CSR` in place of the values of each condensed kernel.

    Models multiply by these kernels as by arrays.

    Args:
      weights: Condensed weights.
      topologies: `{path: topology}` of the weights.
      probes: From `probes`, if scores are wanted: their gradients are the scores.

    Returns:
      A tree like weights.

    Raises:
      ValueError: If a topology has no leaf of its shape.
    """
    return _map(
        weights,
        topologies,
        lambda path, x: topologies[path].bind(x, None if probes is None else probes[path]),
        lambda _, x: x,
    )


def probes(topologies: Topologies) -> dict[str, Any]:
    """Makes zeros whose gradients are the scores that growth needs: see `BlockSparse` and `CSR`."""
    return {path: topology.probe() for path, topology in topologies.items()}


def _map(
    weights: PyTree,
    topologies: Topologies,
    condensed: Callable[[str, Any], Any],
    dense: Callable[[str, Any], Any],
) -> PyTree:
    """Maps leaves by `condensed(path, x)` where there is a topology, else by `dense(path, x)`."""
    check(weights, topologies)
    return _paths.map_with_names(
        lambda path, x: condensed(path, x) if path in topologies else dense(path, x), weights
    )


def check(weights: PyTree, topologies: Topologies) -> None:
    """Raises a ValueError if a topology has no leaf of its shape."""
    named = dict(_paths.flatten_with_paths(weights))
    for path, topology in topologies.items():
        if path not in named:
            raise ValueError(
                f"no leaf {path!r} in the weights; leaves are {_paths.listing(list(named))}"
            )
        if tuple(named[path].shape) != topology.values_shape:
            raise ValueError(
                f"{path!r} has shape {tuple(named[path].shape)}, its topology is for values of "
                f"{topology.values_shape}"
            )


def condense_state(inner_state: PyTree, params: PyTree, topologies: Topologies) -> PyTree:
    """Converts an optimizer's state for dense parameters to one for condensed weights.

    Leaves that mirror a sparse kernel (moments, averages) are cut down to its stored entries;
    counters and leaves of another shape stay as they are.

    Args:
      inner_state: State of the wrapped optimizer (`SparseState.inner_state`).
      params: The dense parameters, or their shapes.
      topologies: From `condense` or `condense_csr`.

    Returns:
      A tree like `inner_state`.
    """
    paths = [path for path, _ in _paths.flatten_with_paths(params)]
    leaves, treedef = jax.tree.flatten(inner_state)
    for i, owner in enumerate(_inner_state.owners(inner_state, params)):
        if owner is not None and paths[owner] in topologies:
            leaves[i] = topologies[paths[owner]].extract(leaves[i])
    return jax.tree.unflatten(treedef, leaves)


def densify_state(
    inner_state: PyTree,
    weights: PyTree,
    topologies: Topologies,
    inner: optax.GradientTransformation,
) -> PyTree:
    """Converts an optimizer's state for condensed weights to one for dense parameters.

    Args:
      inner_state: State for the weights.
      weights: Condensed weights.
      topologies: `{path: topology}` of the weights.
      inner: The optimizer. Where nothing is stored, its state is at rest.

    Returns:
      A tree like `inner.init(dense parameters)`.
    """
    paths = [path for path, _ in _paths.flatten_with_paths(weights)]
    rest = jax.tree.leaves(inner.init(densify(weights, topologies)))
    leaves, treedef = jax.tree.flatten(inner_state)
    for i, owner in enumerate(_inner_state.owners(inner_state, weights)):
        if owner is not None and paths[owner] in topologies:
            topology = topologies[paths[owner]]
            stored = topology.bind(leaves[i]).dense()
            leaves[i] = jnp.where(topology.dense_mask(), stored, rest[i])
    return jax.tree.unflatten(treedef, leaves)
