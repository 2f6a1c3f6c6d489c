"""Counts bytes of weights in several formats, of optimizer state, and of a rewiring step."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from rigl_optax import _axes, _distributions, _layout, _paths
from rigl_optax._axes import KernelAxes
from rigl_optax._types import PyTree

INDEX_BYTES = 4  # column indices and row pointers are int32


class StorageBytes(NamedTuple):
    """Bytes of the same weights in different formats.

    A kernel counts as a matrix whose columns are its output units, found by `axes`. Leaves that
    stay dense are plain arrays in every format.

    Attributes:
      dense: Plain arrays, as masked training holds them in memory, zeros included.
      masks: The masks alone, one bit per weight of a sparse leaf, rounded up to bytes. (In memory
        masks are bool arrays, a byte per weight; a checkpoint or a file needs only the bits.)
      values_and_bitmask: Active values, and those masks. This is the paper's model size without
        the biases that it counts for convolutions that have none.
      csr: Active values with a column index each, and one row pointer more than rows.
      condensed: Constant fan-in: each output unit stores the same number of values with an input
        index each, the mean number of active weights of a unit, rounded up.
    """

    dense: int
    masks: int
    values_and_bitmask: int
    csr: int
    condensed: int


class RewiringBytes(NamedTuple):
    """Bytes that a rewiring step holds at the same time: a lower bound of its peak.

    Attributes:
      params: Parameters.
      gradients: Dense gradients, in the dtypes of the parameters.
      optimizer: Optimizer state, updated in place (donated).
      masks: Old and new masks, a byte per weight each; dense leaves have masks as well.
      scores: Drop and grow scores of all sparse leaves, an int32 per weight each. All are held at
        once, as one loop selects for all layers.
    """

    params: int
    gradients: int
    optimizer: int
    masks: int
    scores: int

    @property
    def total(self) -> int:
        """Sum of the parts. Activations are not in it: they are freed before the optimizer runs."""
        return sum(self)


class UpdateBytes(NamedTuple):
    """Bytes of one compiled optimizer update; made by `compiled_update_bytes`.

    Attributes:
      arguments: Parameters, optimizer state and gradients.
      results: Results that could not be written over the arguments.
      temporary: Temporary arrays of the update: scores, copies.
    """

    arguments: int
    results: int
    temporary: int

    @property
    def total(self) -> int:
        """Sum of the parts: the peak."""
        return sum(self)


def leaf_bytes(
    shape: tuple[int, ...], dtype: Any, active: int, axes: KernelAxes | None = None
) -> StorageBytes:
    """Counts bytes of one sparse leaf.

    Args:
      shape: Shape of the leaf.
      dtype: Dtype of the leaf.
      active: Number of active weights.
      axes: Input and output axes of the leaf; None: the last two.

    Returns:
      Bytes in each format.

    Raises:
      ValueError: If `active` is not between 0 and the number of weights.

    Examples:
      >>> leaf_bytes((100, 50), "float32", 500)
      StorageBytes(dense=20000, masks=625, values_and_bitmask=2625, csr=4404, condensed=4000)
    """
    size, item = math.prod(shape), jnp.dtype(dtype).itemsize
    if not 0 <= active <= size:
        raise ValueError(f"active={active}: a leaf of shape {shape} has {size} weights")
    units = _axes.size(shape, _axes.or_last(axes, len(shape)).outputs)
    rows = size // units if units else 0
    bits = math.ceil(size / 8)
    fan_in = math.ceil(active / units) if units else 0
    return StorageBytes(
        dense=size * item,
        masks=bits,
        values_and_bitmask=active * item + bits,
        csr=active * (item + INDEX_BYTES) + (rows + 1) * INDEX_BYTES,
        condensed=units * fan_in * (item + INDEX_BYTES),
    )


def storage_bytes(
    params: PyTree,
    sparsity: Mapping[str, float],
    *,
    axes: _axes.Axes = _axes.default_axes,
    stacked: Sequence[str] = (),
) -> StorageBytes:
    """Counts bytes of all parameters, sparse leaves in each format and dense ones as they are.

    Args:
      params: Parameters or their shapes.
      sparsity: `{path: sparsity}` of the sparse leaves, as a distribution returns it.
      axes: Rule for the input and output axes of a leaf, as in `uniform`.
      stacked: Patterns of leaves whose leading axis counts layers, as in `uniform`.

    Returns:
      Totals over all leaves.

    Raises:
      ValueError: If `sparsity` names a path that params do not have.

    Examples:
      >>> params = {"kernel": jnp.ones((100, 50)), "bias": jnp.ones(50)}
      >>> storage_bytes(params, {"kernel": 0.9}).values_and_bitmask
      2825
    """
    layout = _layout.layout(params, lambda _: sparsity, masked=False)
    sizes = {path: math.prod(leaf.shape) for path, leaf in _paths.flatten_with_paths(params)}
    zeros = {
        leaf.path: _distributions.zeros_in(sparsity[leaf.path], sizes[leaf.path])
        for leaf in layout.sparse
    }
    active = {path: sizes[path] - zeros[path] for path in zeros}
    return storage_at(params, active, axes=axes, stacked=stacked)


def storage_at(
    params: PyTree,
    active: Mapping[str, int],
    *,
    axes: _axes.Axes = _axes.default_axes,
    stacked: Sequence[str] = (),
) -> StorageBytes:
    """Counts bytes as `storage_bytes` does, from the number of active weights of each leaf.

    Args:
      params: Parameters or their shapes.
      active: `{path: number of active weights}` of the sparse leaves.
      axes: As in `storage_bytes`.
      stacked: As in `storage_bytes`.

    Returns:
      Totals over all leaves.
    """
    totals = [0] * len(StorageBytes._fields)
    stacks = _distributions.stacked_paths(params, stacked)
    for path, leaf in _paths.flatten_with_paths(params):
        if path in active:
            found = _axes.of_leaf(axes, path, leaf, path in stacks)
            each = leaf_bytes(tuple(leaf.shape), leaf.dtype, active[path], found)
        else:
            size = array_bytes(leaf)
            each = StorageBytes(size, 0, size, size, size)
        totals = [total + n for total, n in zip(totals, each, strict=True)]
    return StorageBytes(*totals)


def array_bytes(tree: PyTree) -> int:
    """Counts bytes of all arrays of a tree from their shapes; PRNG keys count as their data."""
    return sum(_leaf_bytes(leaf) for leaf in jax.tree.leaves(tree))


def optimizer_bytes(tx: optax.GradientTransformation, params: PyTree) -> int:
    """Counts bytes of an optimizer's state by `eval_shape` of its `init`: nothing is allocated.

    For a sparse transformation this includes the masks, a byte per weight.

    Args:
      tx: Any Optax transformation.
      params: Parameters or their shapes.

    Returns:
      Bytes.
    """
    return array_bytes(jax.eval_shape(tx.init, params))


def rewiring_bytes(
    params: PyTree, inner: optax.GradientTransformation, sparsity: Mapping[str, float]
) -> RewiringBytes:
    """Computes a lower bound of the memory of a rewiring step, without compiling it.

    It is params + gradients + optimizer state + 2 bytes per weight (masks) + 8 bytes per weight of
    sparse leaves (scores). XLA keeps copies besides; `compiled_update_bytes` counts them.

    Args:
      params: Parameters or their shapes.
      inner: The wrapped optimizer.
      sparsity: `{path: sparsity}` of the sparse leaves.

    Returns:
      The parts of the bound.
    """
    sizes = {path: math.prod(leaf.shape) for path, leaf in _paths.flatten_with_paths(params)}
    size = array_bytes(params)
    return RewiringBytes(
        params=size,
        gradients=size,
        optimizer=optimizer_bytes(inner, params),
        masks=2 * sum(sizes.values()),
        scores=8 * sum(sizes[path] for path in sparsity),
    )


def compiled_update_bytes(tx: optax.GradientTransformation, params: PyTree) -> UpdateBytes:
    """Asks the compiler for the memory of one optimizer update on this device.

    Compiles `tx.update` (rewiring included) and `optax.apply_updates` from shapes, with parameters
    and state donated. This takes seconds, but no memory for the arrays.

    Args:
      tx: Any Optax transformation.
      params: Parameters or their shapes.

    Returns:
      Bytes from XLA's memory analysis.

    Raises:
      RuntimeError: If the backend has no memory analysis.
    """
    shapes = jax.eval_shape(lambda tree: tree, params)
    state = jax.eval_shape(tx.init, shapes)

    def update(params: PyTree, state: PyTree, gradients: PyTree) -> tuple[PyTree, PyTree]:
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    compiled = jax.jit(update, donate_argnums=(0, 1)).lower(shapes, state, shapes).compile()
    analysis: Any = compiled.memory_analysis()
    if analysis is None:
        raise RuntimeError(f"no memory analysis on {jax.default_backend()}")
    return UpdateBytes(
        arguments=analysis.argument_size_in_bytes,
        results=analysis.output_size_in_bytes - analysis.alias_size_in_bytes,
        temporary=analysis.temp_size_in_bytes,
    )


def _leaf_bytes(leaf: Any) -> int:
    dtype = leaf.dtype
    if jax.dtypes.issubdtype(dtype, jax.dtypes.extended):
        leaf = jax.eval_shape(jax.random.key_data, leaf)
    return math.prod(leaf.shape) * leaf.dtype.itemsize
