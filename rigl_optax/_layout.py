"""Finds out, from shapes alone, which leaves of params are sparse and how they are ranked."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from rigl_optax import _axes, _distributions, _paths, _structures
from rigl_optax._axes import KernelAxes
from rigl_optax._ranking import _packing
from rigl_optax._ranking._packing import Packing, RankingIds
from rigl_optax._structures import Structure, Structures
from rigl_optax._types import LayerSparsities, PyTree, Sparsity


class SparseLeaf(NamedTuple):
    """A leaf with a mask.

    Attributes:
      path: Its name.
      position: Its position among all leaves of params, in tree order.
      stacked: Whether its first axis counts layers.
      zeros: Number of inactive groups of each ranking in it; None if initial masks decide.
      structure: The groups of its weights.
      shape: Its shape.
      grid: Shape of its groups, which are what is ranked; if stacked, with the axis of layers.
      axes: Axes of one layer; None for [*window, in, out].
    """

    path: str
    position: int
    stacked: bool
    zeros: int | None
    structure: Structure
    shape: tuple[int, ...]
    grid: tuple[int, ...]
    axes: KernelAxes | None = None

    @property
    def leading(self) -> int:
        """Returns how many of the grid's first axes count rankings: layers and their parts."""
        return self.stacked + self.structure.parts(self.grid[self.stacked :])

    @property
    def rankings(self) -> int:
        """Returns the number of rankings: of layers, or of parts if layers have parts."""
        return math.prod(self.grid[: self.leading])

    @property
    def layers(self) -> int:
        """Returns the number of layers: 1, or as many as are stacked."""
        return self.shape[0] if self.stacked else 1

    @property
    def layer_shape(self) -> tuple[int, ...]:
        """Returns the shape of one layer, with its axes in the leaf's order."""
        return self.shape[self.stacked :]

    @property
    def kernel(self) -> tuple[int, ...]:
        """Returns the shape of one layer as [*window, in, out]."""
        return _axes.kernel_shape(self.layer_shape, self.axes)

    @property
    def kernel_axes(self) -> KernelAxes:
        """Returns the axes of one layer in the leaf's order."""
        return _axes.or_last(self.axes, len(self.layer_shape))

    @property
    def unit_axes(self) -> tuple[int, ...]:
        """Returns the axes of the grid that count units, or columns of blocks."""
        if self.axes is None or self._is_grouped:
            return (len(self.grid) - 1,)
        return tuple(a + self.stacked for a in self.axes.outputs)

    @property
    def _is_grouped(self) -> bool:
        return self.structure != _structures.UNSTRUCTURED

    def pool(self, x: jax.Array) -> jax.Array:
        """Returns scores of the groups, float32, in the shape of the grid."""
        return self._of_layers(self.structure.pool, x)

    def mean(self, x: jax.Array) -> jax.Array:
        """Returns signed means of the groups, float32, in the shape of the grid."""
        return self._of_layers(self.structure.mean, x)

    def groups(self, mask: jax.Array) -> jax.Array:
        """Returns the mask of the groups from a mask of the weights."""
        return self._of_layers(self.structure.groups, mask)

    def expand(self, mask: jax.Array) -> jax.Array:
        """Returns the mask of the weights from a mask of the groups."""

        def expand(mask: jax.Array) -> jax.Array:
            if not self._is_grouped:
                return mask
            whole = self.structure.expand(mask, self.kernel)
            return _axes.from_kernel(whole, self.axes, self.layer_shape)

        return jax.vmap(expand)(mask) if self.stacked else expand(mask)

    def choose(self, scores: jax.Array) -> jax.Array:
        """Returns the mask of the groups of a transposable leaf: its structure's choice."""
        assert isinstance(self.structure, _structures.NM)
        choose = self.structure.choose
        return jax.vmap(choose)(scores) if self.stacked else choose(scores)

    def misfit(self, mask: np.ndarray) -> str:
        """Says why a mask of the weights does not fit the structure; empty if it does."""
        if not self._is_grouped:
            return ""
        layers = [_axes.to_kernel(x, self.axes) for x in (mask if self.stacked else mask[None])]
        return next(filter(None, (self.structure.misfit(x) for x in layers)), "")

    def fits_as_stack(self, mask: np.ndarray) -> bool:
        """Returns whether a mask that does not fit would fit if its first axis counted layers."""
        one = jax.ShapeDtypeStruct(self.shape[1:], mask.dtype)
        if self.stacked or len(one.shape) < 2:
            return False
        axes = _axes.unusual(_axes.default_axes(self.path, one), len(one.shape))
        stack = self._replace(stacked=True, axes=axes)
        return _has_grid(self.structure, stack.kernel) and not stack.misfit(mask)

    def _of_layers(self, function: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
        """Applies a function of [*window, in, out] to each layer."""

        def apply(x: jax.Array) -> jax.Array:
            # Single weights are not transposed: their ties go by the index in the leaf.
            return function(_axes.to_kernel(x, self.axes) if self._is_grouped else x)

        return jax.vmap(apply)(x) if self.stacked else apply(x)


def packing(sparse: Sequence[SparseLeaf]) -> Packing:
    """Chooses how the groups of sparse leaves are laid out for ranking."""
    result = _packing.packing([leaf.grid for leaf in sparse], [leaf.leading for leaf in sparse])
    if any(leaf.structure.has_parts for leaf in sparse):
        # Parts are many and small. Padded to whole rows they would be far larger than the weights.
        return result._replace(is_packed=False, in_parts=True)
    return result


def layer_ids(sparse: Sequence[SparseLeaf]) -> list[RankingIds]:
    """Returns, for leaves that are not packed, the layers as rankings, whatever their parts."""
    ends = np.cumsum([leaf.layers for leaf in sparse])
    result = []
    for leaf, end in zip(sparse, ends, strict=True):
        ids = np.arange(end - leaf.layers, end, dtype=np.int32).reshape(leaf.grid[: leaf.stacked])
        result.append(RankingIds(ids, np.zeros_like(ids)))
    return result


class Layout(NamedTuple):
    """The leaves of params, and which of them are sparse; static under jit.

    Attributes:
      treedef: Tree structure of params.
      paths: Names of all leaves, in tree order.
      leaves: All leaves, arrays or shapes.
      sparse: The sparse leaves, in tree order.
    """

    treedef: Any
    paths: list[str]
    leaves: list[Any]
    sparse: list[SparseLeaf]

    def select(self, leaves: list[Any]) -> list[Any]:
        """Selects, from a list with an entry for each leaf, the entries of the sparse leaves."""
        return [leaves[s.position] for s in self.sparse]


def as_distribution(sparsity: Sparsity | None, initial_masks: PyTree | None) -> LayerSparsities:
    """Turns the argument `sparsity` of a method into a distribution.

    Args:
      sparsity: A number s, which stands for `erk(s)`; a distribution, which is returned as it is;
        or None for the sparsities of the initial masks.
      initial_masks: The argument of the method.

    Returns:
      `distribution(params) -> {path: sparsity}`.

    Raises:
      ValueError: If `sparsity` is None without initial masks, or is outside [0, 1).
      TypeError: If `sparsity` is neither a number nor a function.
    """
    if sparsity is None:
        if initial_masks is None:
            raise ValueError(
                "sparsity=None: only with initial_masks; else give a number in [0, 1) or a "
                "distribution"
            )
        return lambda params: _sparsities_of(initial_masks)
    if callable(sparsity):
        return sparsity
    return _distributions.erk(sparsity)


def layout(
    params: PyTree,
    distribution: LayerSparsities,
    masked: bool,
    structure: Structures = _structures.UNSTRUCTURED,
) -> Layout:
    """Finds which leaves of `params` are sparse, and how.

    Args:
      params: Arrays or shapes, in any pytree.
      distribution: `distribution(params) -> {path: sparsity}`.
      masked: Whether initial masks decide on the numbers of zeros.
      structure: A structure for all sparse leaves, or `{pattern: structure}`.

    Returns:
      The layout.

    Raises:
      ValueError: As the distribution does, or if it names a path that does not exist; if a
        structure does not fit its layer.
    """
    treedef = jax.tree.structure(params)
    named = _paths.named_arrays(params)
    paths, leaves = [path for path, _ in named], [leaf for _, leaf in named]
    if not leaves:
        return Layout(treedef, [], leaves, [])
    sparsities = distribution(params)
    unknown = [path for path in sparsities if path not in paths]
    if unknown:
        raise ValueError(
            f"no leaf {_paths.listing(unknown)} in params; leaves are {_paths.listing(paths)}"
        )
    stacked: set[str] = set()
    axes_of = axes_rule(distribution)
    if isinstance(distribution, _distributions.Distribution):
        stacked = distribution.stacked_paths(params)
    structures = _structures.by_path(structure, [path for path in paths if path in sparsities])
    sparse = []
    for index, (path, leaf) in enumerate(zip(paths, leaves, strict=True)):
        if path not in sparsities:
            continue
        _distributions.check_sparsity(f"sparsity of {path!r}", sparsities[path])
        shape = tuple(leaf.shape)
        slices, layer = (shape[:1], shape[1:]) if path in stacked else ((), shape)
        leaf_axes = _axes.find(axes_of, path, jax.ShapeDtypeStruct(layer, leaf.dtype))
        axes = _axes.unusual(leaf_axes, len(layer))
        kind, kernel = structures[path], layer
        if kind != _structures.UNSTRUCTURED:
            kernel = _axes.kernel_shape(layer, axes)
        if not masked and not sparsities[path] and not _has_grid(kind, kernel):
            # Sparsity 0: a layer that its structure does not fit is all active without one.
            kind, kernel = _structures.UNSTRUCTURED, layer
        grid = kind.grid(kernel, path)
        zeros = None if masked else kind.zeros(sparsities[path], grid, path)
        sparse.append(
            SparseLeaf(path, index, path in stacked, zeros, kind, shape, slices + grid, axes)
        )
    return Layout(treedef, paths, leaves, sparse)


def axes_rule(distribution: Any) -> _axes.Axes:
    """Returns the `axes` of one of our distributions, or the default."""
    if isinstance(distribution, _distributions.Distribution):
        return distribution.axes
    return _axes.default_axes


def _has_grid(structure: Structure, kernel: tuple[int, ...]) -> bool:
    try:
        structure.grid(kernel, "")
    except ValueError:
        return False
    return True


def check_total(layout: Layout) -> None:
    """Checks that groups can move between layers.

    Raises:
      ValueError: If a structure fixes the number of each part of a layer, if groups have different
        numbers of weights, or if there are more weights than int32 can count.
    """
    split = [leaf for leaf in layout.sparse if leaf.structure.has_parts]
    if split:
        raise ValueError(
            f"structure: {split[0].path!r} has {split[0].structure}, which fixes how many weights "
            "each part of a layer has; this method moves them between layers"
        )
    sizes = {
        leaf.path: np.unique(leaf.structure.group_sizes(leaf.kernel)).tolist()
        for leaf in layout.sparse
    }
    if len({size for each in sizes.values() for size in each}) > 1:
        shown = [f"{path}: {' and '.join(map(str, each))}" for path, each in sizes.items()]
        raise ValueError(
            "structure: connections move between layers, which needs groups of as many weights in "
            f"all of them; weights in a group are {_paths.listing(shown)}"
        )
    total = sum(int(np.prod(leaf.shape)) for leaf in layout.select(layout.leaves))
    if total > _distributions.MAX_LEAF_SIZE:
        raise ValueError(
            f"{total} sparse weights in all layers: a method that moves weights between layers "
            f"counts them together, and can count at most {_distributions.MAX_LEAF_SIZE} "
            "(2**31 - 1)"
        )


def check_same_leaves(final: Layout, initial: Layout) -> None:
    """Checks that two layouts have the same sparse leaves.

    Raises:
      ValueError: If they do not, or a leaf starts with more zeros than it ends with.
    """
    paths, started = ([leaf.path for leaf in layout.sparse] for layout in (final, initial))
    if paths != started:
        raise ValueError(
            f"initial_sparsity: makes {_paths.listing(started)} sparse, but the final "
            f"distribution makes {_paths.listing(paths)} sparse; give both the same options"
        )
    for leaf, start in zip(final.sparse, initial.sparse, strict=True):
        if leaf.zeros is not None and start.zeros is not None and start.zeros > leaf.zeros:
            raise ValueError(
                f"initial_sparsity: {leaf.path!r} would start with {start.zeros} zeros and end "
                f"with {leaf.zeros}"
            )


def at_start(sparsity: Sparsity, final: Sparsity, name: str) -> LayerSparsities:
    """Turns a second sparsity of a method into a distribution of the same kind as the first.

    Args:
      sparsity: A distribution, which is returned as it is; or a number, at most that of `final`.
      final: The argument `sparsity` of the method.
      name: Name of the second argument, for errors.

    Returns:
      `distribution(params) -> {path: sparsity}`.

    Raises:
      ValueError: If the number is outside [0, 1) or above the final one; or if it is not 0 and
        `final` is the user's own function.
    """
    if callable(sparsity):
        return sparsity
    _distributions.check_sparsity(name, sparsity)
    distribution = as_distribution(final, None)
    if sparsity == 0:
        if isinstance(distribution, _distributions.Distribution):
            return dataclasses.replace(distribution, sparsity=0.0, density_scale=None, overrides={})
        return lambda params: dict.fromkeys(distribution(params), 0.0)
    if not isinstance(distribution, _distributions.Distribution):
        raise ValueError(
            f"{name}={sparsity}: if sparsity is a function of your own, {name} must be a function "
            "too, or 0"
        )
    if sparsity > distribution.sparsity:
        raise ValueError(
            f"sparsity={distribution.sparsity}, {name}={sparsity} (given, or by default): {name} "
            "must be at most sparsity; give a lower one"
        )
    return dataclasses.replace(distribution, sparsity=sparsity)


def _sparsities_of(masks: PyTree) -> dict[str, float]:
    """Returns the sparsity of each mask that is not all True."""
    named = _paths.flatten_with_paths(masks)
    if any(isinstance(mask, jax.core.Tracer) for _, mask in named):
        raise ValueError(
            "sparsity=None: which leaves are sparse must be known before tracing, but the "
            "initial masks are traced; pass a sparsity or a distribution too"
        )
    shares = {path: 1 - float(np.mean(np.asarray(mask))) for path, mask in named}
    empty = [path for path, share in shares.items() if share == 1]
    if empty:
        raise ValueError(f"initial_masks: nothing is active in {_paths.listing(empty)}")
    sparsities = {path: share for path, share in shares.items() if share > 0}
    if named and not sparsities:
        raise ValueError(
            "nothing left to sparsify: every initial mask is all True; to start sparse training "
            "from dense masks, pass a distribution too"
        )
    return sparsities
