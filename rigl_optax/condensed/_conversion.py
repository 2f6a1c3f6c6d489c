"""Between dense parameters with masks and condensed weights with topologies, both ways.

Condensed weights are a tree like params in which the values of stored blocks, or of single weights,
take the place of sparse kernels: plain arrays, for any optimizer. Where they are is in a second
mapping, from the paths of those leaves to topologies.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rigl_optax import _axes, _masks, _paths, _structures
from rigl_optax._structures import Block, Structures, Unstructured
from rigl_optax._types import PyTree
from rigl_optax._wrapper import _inner_state
from rigl_optax.condensed.blocks import _topology
from rigl_optax.condensed.blocks._kernel import BlockSparse
from rigl_optax.condensed.blocks._topology import Topology
from rigl_optax.condensed.single import _csr
from rigl_optax.condensed.single._csr import CSR
from rigl_optax.condensed.single._csr_topology import CSRTopology, csr_topology

Topologies = Mapping[str, Topology | CSRTopology]


def condense(
    params: PyTree,
    masks: PyTree,
    structure: Structures,
    *,
    axes: _axes.Axes = _axes.default_axes,
) -> tuple[PyTree, dict[str, Topology | CSRTopology]]:
    """What is stored of dense parameters: whole blocks, or single weights where there are none.

    Args:
      params: Parameters, dense.
      masks: Bool tree like params (`get_masks`), or of some of its leaves (`export.read`).
        Kernels with a full mask, or none, stay dense.
      structure: What they were trained with: a `Block`, `Unstructured()`, or by pattern.
      axes: As in `uniform`. What is stored stands for kernels (*window, in, out) alone: others are
        refused.

    Returns:
      Weights: a tree like params; and `{path: topology}` of the kernels that are condensed.

    Raises:
      ValueError: If masks do not belong to params, or are not made of whole blocks; if a layer has
        another structure or layout, or single weights in a kernel that has not two axes.

    Example:
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
    topologies: dict[str, Topology | CSRTopology] = {}
    for path, (mask, shape) in partial.items():
        block = structures[path]
        if isinstance(block, Unstructured):
            topologies[path] = _single_weights(mask, shape, path)
            continue
        if not isinstance(block, Block):
            raise ValueError(
                f"{path!r} has {block}, for which there is no training of what is stored; "
                "condense_csr stores its weights to deploy them"
            )
        grid = _topology.check_grid(mask, shape, block, path)
        cols, rows = (jnp.asarray(i, jnp.int32) for i in np.nonzero(grid.T))
        topologies[path] = Topology(rows, cols, shape, block)
    return extract(params, topologies), topologies


def condense_csr(
    params: PyTree, masks: PyTree, *, axes: _axes.Axes = _axes.default_axes
) -> tuple[PyTree, dict[str, CSRTopology]]:
    """Single weights of dense parameters, whatever their masks and the structure behind these.

    Args:
      params: Parameters, dense.
      masks: Bool tree like params (`get_masks`), or of some of its leaves (`export.read`). What
        has a full mask, or none, stays dense.
      axes: As in `condense`.

    Returns:
      Weights: a tree like params with a vector of values for each kernel that is sparse; and
      `{path: topology}` of these.

    Raises:
      ValueError: If masks do not belong to params, or one of a leaf without two axes, or of
        another layout, is not full.

    Example:
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
        path: _single_weights(mask, shape, path)
        for path, (mask, shape) in _partial(params, masks, axes).items()
    }
    return extract(params, topologies), topologies


def _single_weights(mask: Any, shape: tuple[int, ...], path: str) -> CSRTopology:
    if len(shape) != 2:
        raise ValueError(
            f"{path!r} has shape {shape}: single weights need two axes; if its leading axis counts "
            "layers, give each layer a leaf of its own"
        )
    return csr_topology(mask)


def _partial(
    params: PyTree, masks: PyTree, axes: _axes.Axes
) -> dict[str, tuple[Any, tuple[int, ...]]]:
    """The masks that are not full, with the shapes of their leaves."""
    named = _paths.flatten_with_paths(params)
    paths, leaves = [path for path, _ in named], [leaf for _, leaf in named]
    found = _masks.of_params(masks, paths, leaves, allow_missing=True)
    partial = {p: (found[p], tuple(x.shape)) for p, x in named if not np.all(np.asarray(found[p]))}
    for path, leaf in named:
        if path not in partial:
            continue
        layout = _axes.find(axes, path, leaf)
        if _axes.unusual(layout, len(leaf.shape)) is not None:
            raise ValueError(
                f"{path!r} of shape {tuple(leaf.shape)} has its inputs along {layout.inputs} and "
                f"outputs along {layout.outputs}; what is stored stands for kernels (*window, in, "
                "out): transpose its weights and mask, or pass axes=rigl_optax.flax_axes if they "
                "are laid out so"
            )
    return partial


def extract(params: PyTree, topologies: Topologies) -> PyTree:
    """What is stored of dense parameters, which need not be zero elsewhere.

    Args:
      params: Parameters, dense.
      topologies: `{path: topology}` of the kernels to condense.

    Returns:
      Weights: a tree like params.

    Raises:
      ValueError: If a topology is of no leaf, or of one of another shape.
    """
    named = _paths.flatten_with_paths(params)
    shapes = {path: tuple(leaf.shape) for path, leaf in named}
    for path, topology in topologies.items():
        if shapes.get(path) != topology.shape:
            raise ValueError(
                f"topology of {path!r}, of shape {topology.shape}, has no such leaf; leaves are "
                f"{', '.join(f'{p} {shape}' for p, shape in shapes.items())}"
            )
    leaves = [_extract(x, topologies[p]) if p in topologies else x for p, x in named]
    return jax.tree.unflatten(jax.tree.structure(params), leaves)


def densify(weights: PyTree, topologies: Topologies) -> PyTree:
    """Dense parameters, zero where there is no block.

    Args:
      weights: Condensed weights, or anything like them, as an average of them.
      topologies: Of theirs.

    Returns:
      A tree of the same structure.

    Raises:
      ValueError: If a topology has no leaf of its shape.
    """
    kernels = bind(weights, topologies)
    return jax.tree.map(lambda x: x.dense() if _is_kernel(x) else x, kernels, is_leaf=_is_kernel)


def masks_of(weights: PyTree, topologies: Topologies) -> PyTree:
    """Masks of the dense parameters: bool arrays, all True for leaves that are dense."""
    kernels = bind(weights, topologies)

    def mask(x: Any) -> jax.Array:
        return _mask(x.topology) if _is_kernel(x) else jnp.ones(jnp.shape(x), bool)

    return jax.tree.map(mask, kernels, is_leaf=_is_kernel)


def bind(
    weights: PyTree, topologies: Topologies, probes: Mapping[str, Any] | None = None
) -> PyTree:
    """Weights with a `BlockSparse` or `CSR` for each condensed kernel: what models multiply by.

    Args:
      weights: Condensed weights.
      topologies: `{path: topology}`.
      probes: `{path: zeros}` from `probes`, where scores are wanted.

    Returns:
      A tree like weights.

    Raises:
      ValueError: If a topology has no leaf of its shape.
    """
    check(weights, topologies)

    def kernel(name: str, leaf: Any) -> Any:
        if name not in topologies:
            return leaf
        return _kernel(leaf, topologies[name], None if probes is None else probes[name])

    return _paths.map_with_names(kernel, weights)


def probes(topologies: Topologies) -> dict[str, Any]:
    """Zeros whose gradients are what growth needs to know: see `BlockSparse` and `CSR`."""
    return {path: _probe(topology) for path, topology in topologies.items()}


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
    """The state of an optimizer for condensed weights, from that for dense parameters.

    What mirrors a sparse kernel (moments, averages) becomes the blocks of it; counters and what
    has another shape stay as they are.

    Args:
      inner_state: Of the wrapped optimizer (`SparseState.inner_state`).
      params: The dense parameters, or their shapes.
      topologies: From `condense` or `condense_csr`.

    Returns:
      A tree like `inner_state`.
    """
    paths = [path for path, _ in _paths.flatten_with_paths(params)]
    leaves, treedef = jax.tree.flatten(inner_state)
    for i, owner in enumerate(_inner_state.owners(inner_state, params)):
        if owner is not None and paths[owner] in topologies:
            leaves[i] = _extract(leaves[i], topologies[paths[owner]])
    return jax.tree.unflatten(treedef, leaves)


def densify_state(
    inner_state: PyTree,
    weights: PyTree,
    topologies: Topologies,
    inner: optax.GradientTransformation,
) -> PyTree:
    """The state of an optimizer for dense parameters, from that for condensed weights.

    Args:
      inner_state: As it is for the weights.
      weights: Condensed weights.
      topologies: Of theirs.
      inner: The optimizer: where there is no block, its state is at rest.

    Returns:
      A tree like `inner.init` of the dense parameters.
    """
    paths = [path for path, _ in _paths.flatten_with_paths(weights)]
    rest = jax.tree.leaves(inner.init(densify(weights, topologies)))
    leaves, treedef = jax.tree.flatten(inner_state)
    for i, owner in enumerate(_inner_state.owners(inner_state, weights)):
        if owner is not None and paths[owner] in topologies:
            topology = topologies[paths[owner]]
            leaves[i] = jnp.where(_mask(topology), _kernel(leaves[i], topology).dense(), rest[i])
    return jax.tree.unflatten(treedef, leaves)


def _probe(topology: Topology | CSRTopology) -> Any:
    if isinstance(topology, CSRTopology):
        return _csr.probe(topology)
    return jnp.zeros(topology.grid, jnp.float32)


def _kernel(
    values: jax.Array, topology: Topology | CSRTopology, probe: Any = None
) -> BlockSparse | CSR:
    if isinstance(topology, CSRTopology):
        return CSR(values, topology, probe)
    return BlockSparse(values, topology, probe)


def _extract(dense: jax.Array, topology: Topology | CSRTopology) -> jax.Array:
    if isinstance(topology, CSRTopology):
        return topology.extract(dense)
    return _topology.extract(dense, topology)


def _mask(topology: Topology | CSRTopology) -> jax.Array:
    """Of the weights of the dense kernel."""
    if isinstance(topology, CSRTopology):
        return topology.mask()
    return topology.block.expand(topology.mask(), topology.shape)


def _is_kernel(x: Any) -> bool:
    return isinstance(x, BlockSparse | CSR)
