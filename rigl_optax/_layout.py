"""What is known of params before anything is computed: which leaves are sparse, and how."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from rigl_optax import _axes, _distributions, _paths, _structures
from rigl_optax._axes import KernelAxes
from rigl_optax._ranking import _packing
from rigl_optax._ranking._packing import Packing, Rows
from rigl_optax._structures import Structure, Structures
from rigl_optax._types import LayerSparsities, PyTree, Sparsity


class SparseLeaf(NamedTuple):
    """A leaf with a mask."""

    path: str
    position: int  # among all leaves of params, in tree order
    stacked: bool  # the leading axis counts layers
    zeros: int | None  # groups, of each layer in it; None when initial masks say
    structure: Structure
    shape: tuple[int, ...]
    grid: tuple[int, ...]  # of its groups; what is ranked
    axes: KernelAxes | None = None  # of one layer; None for [*window, in, out]

    @property
    def leading(self) -> int:
        """Number of axes in front of the grid that count rankings: layers, and parts of them."""
        return self.stacked + self.structure.parts(self.grid[self.stacked :])

    @property
    def rankings(self) -> int:
        """Number of rankings: 1, or how many layers are stacked, or parts of layers."""
        return math.prod(self.grid[: self.leading])

    @property
    def layers(self) -> int:
        """Number of layers: 1, or how many are stacked."""
        return self.shape[0] if self.stacked else 1

    @property
    def layer_shape(self) -> tuple[int, ...]:
        """Shape of one layer as the leaf has it."""
        return self.shape[self.stacked :]

    @property
    def kernel(self) -> tuple[int, ...]:
        """Shape of one layer as [*window, in, out]."""
        return _axes.kernel_shape(self.layer_shape, self.axes)

    @property
    def kernel_axes(self) -> KernelAxes:
        """Axes of one layer as the leaf has it."""
        return _axes.or_last(self.axes, len(self.layer_shape))

    @property
    def unit_axes(self) -> tuple[int, ...]:
        """Axes of the grid that count units: groups of outputs."""
        if self.axes is None or self._is_grouped:
            return (len(self.grid) - 1,)
        return tuple(a + self.stacked for a in self.axes.outputs)

    @property
    def _is_grouped(self) -> bool:
        return self.structure != _structures.UNSTRUCTURED

    def pool(self, x: jax.Array) -> jax.Array:
        """Scores of the groups, float32, in the shape of the grid."""
        return self._of_layers(self.structure.pool, x)

    def mean(self, x: jax.Array) -> jax.Array:
        """Means of the groups, with their signs; float32, in the shape of the grid."""
        return self._of_layers(self.structure.mean, x)

    def groups(self, mask: jax.Array) -> jax.Array:
        """From a mask of the weights to one of the groups."""
        return self._of_layers(self.structure.groups, mask)

    def expand(self, mask: jax.Array) -> jax.Array:
        """From a mask of the groups to one of the weights."""

        def expand(mask: jax.Array) -> jax.Array:
            if not self._is_grouped:
                return mask
            whole = self.structure.expand(mask, self.kernel)
            return _axes.from_kernel(whole, self.axes, self.layer_shape)

        return jax.vmap(expand)(mask) if self.stacked else expand(mask)

    def misfit(self, mask: np.ndarray) -> str:
        """Says what is wrong with a mask of the weights; empty if nothing is."""
        if not self._is_grouped:
            return ""
        layers = [_axes.to_kernel(x, self.axes) for x in (mask if self.stacked else mask[None])]
        return next(filter(None, (self.structure.misfit(x) for x in layers)), "")

    def fits_as_stack(self, mask: np.ndarray) -> bool:
        """Whether a mask would fit if the leading axis counted layers, which it does not."""
        one = jax.ShapeDtypeStruct(self.shape[1:], mask.dtype)
        if self.stacked or len(one.shape) < 2:
            return False
        axes = _axes.unusual(_axes.default_axes(self.path, one), len(one.shape))
        stack = self._replace(stacked=True, axes=axes)
        return _has_grid(self.structure, stack.kernel) and not stack.misfit(mask)

    def _of_layers(self, function: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
        """Applies a function of [*window, in, out] to each layer; single weights stay in place."""

        def apply(x: jax.Array) -> jax.Array:
            return function(_axes.to_kernel(x, self.axes) if self._is_grouped else x)

        return jax.vmap(apply)(x) if self.stacked else apply(x)


def packing(sparse: Sequence[SparseLeaf]) -> Packing:
    """How the groups of sparse leaves are laid out for ranking.

    Parts of layers are many and small: padded to rows, as leaves side by side are, they would
    be far larger than the weights.
    """
    found = _packing.packing([leaf.grid for leaf in sparse], [leaf.leading for leaf in sparse])
    if any(leaf.structure.has_parts for leaf in sparse):
        return found._replace(is_packed=False, in_parts=True)
    return found


def layer_rows(sparse: Sequence[SparseLeaf]) -> list[Rows]:
    """For each leaf, laid out apart, the layers as rankings, whatever parts they have."""
    ends = np.cumsum([leaf.layers for leaf in sparse])
    found = []
    for leaf, end in zip(sparse, ends, strict=True):
        ids = np.arange(end - leaf.layers, end, dtype=np.int32).reshape(leaf.grid[: leaf.stacked])
        found.append(Rows(ids, np.zeros_like(ids)))
    return found


class Layout(NamedTuple):
    """The leaves of params and which of them are sparse: static under jit."""

    treedef: Any
    paths: list[str]
    leaves: list[Any]
    sparse: list[SparseLeaf]

    def select(self, leaves: list[Any]) -> list[Any]:
        """Of one entry per leaf, those of the sparse leaves."""
        return [leaves[s.position] for s in self.sparse]


def as_distribution(sparsity: Sparsity | None, initial_masks: PyTree | None) -> LayerSparsities:
    """A float s means `erk(s)`; None means: as the initial masks are.

    Raises:
      ValueError: If `sparsity` is None without initial masks, or is outside [0, 1).
      TypeError: If `sparsity` is neither a number nor a function.
    """
    if sparsity is None:
        if initial_masks is None:
            raise ValueError("sparsity=None: only with initial_masks; else a number in [0, 1)")
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
    """Which leaves of `params` are sparse.

    Args:
      params: Arrays or shapes, in any pytree.
      distribution: Function of params to `{path: sparsity}`.
      masked: Whether initial masks decide on the numbers of zeros.
      structure: Of all sparse leaves, or by pattern.

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
        found = _axes.find(axes_of, path, jax.ShapeDtypeStruct(layer, leaf.dtype))
        axes = _axes.unusual(found, len(layer))
        kind, kernel = structures[path], layer
        if kind != _structures.UNSTRUCTURED:
            kernel = _axes.kernel_shape(layer, axes)
        if not masked and not sparsities[path] and not _has_grid(kind, kernel):
            kind, kernel = _structures.UNSTRUCTURED, layer  # all of it is active
        grid = kind.grid(kernel, path)
        zeros = None if masked else kind.zeros(sparsities[path], grid, path)
        sparse.append(
            SparseLeaf(path, index, path in stacked, zeros, kind, shape, slices + grid, axes)
        )
    return Layout(treedef, paths, leaves, sparse)


def axes_rule(distribution: Any) -> _axes.Axes:
    """Which axes of leaves are inputs: as one of our distributions says, or the default."""
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
    """Raises a ValueError if the groups of all layers cannot be counted together.

    They must be of one size, and their weights few enough for int32.
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
            "structure: what moves connections between layers needs groups of as many weights "
            f"in all of them; weights in a group are {_paths.listing(shown)}"
        )
    total = sum(int(np.prod(leaf.shape)) for leaf in layout.select(layout.leaves))
    if total > _distributions.MAX_LEAF_SIZE:
        raise ValueError(
            f"{total} sparse weights in all layers; what moves weights between layers counts them "
            f"together, and can up to {_distributions.MAX_LEAF_SIZE} (2**31 - 1)"
        )


def check_same_leaves(final: Layout, initial: Layout) -> None:
    """Raises a ValueError unless both have the same sparse leaves, the initial ones no sparser."""
    paths, started = ([leaf.path for leaf in layout.sparse] for layout in (final, initial))
    if paths != started:
        raise ValueError(
            f"initial_sparsity: makes {_paths.listing(started)} sparse, where the final "
            f"distribution has {_paths.listing(paths)}; give both the same options"
        )
    for leaf, start in zip(final.sparse, initial.sparse, strict=True):
        if leaf.zeros is not None and start.zeros is not None and start.zeros > leaf.zeros:
            raise ValueError(
                f"initial_sparsity: {leaf.path!r} would start with {start.zeros} zeros and end "
                f"with {leaf.zeros}"
            )


def at_start(sparsity: Sparsity, final: Sparsity, name: str) -> LayerSparsities:
    """A second distribution: of the kind of the final one, where only a number is given.

    Args:
      sparsity: A number at most that of `final`, or a distribution.
      final: What the method's `sparsity` is.
      name: Of the argument, for errors.

    Raises:
      ValueError: If the number is outside [0, 1) or above the final one; or if it is not 0 and
        the final distribution is a function of one's own.
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
            f"{name}={sparsity}: with a sparsity that is a function of one's own, give a function "
            "here too, or 0"
        )
    if sparsity > distribution.sparsity:
        raise ValueError(
            f"sparsity={distribution.sparsity}, {name}={sparsity} (given, or by default): {name} "
            "must be at most sparsity; give it too"
        )
    return dataclasses.replace(distribution, sparsity=sparsity)


def _sparsities_of(masks: PyTree) -> dict[str, float]:
    """Sparsity of each mask that is not all True."""
    named = _paths.flatten_with_paths(masks)
    if any(isinstance(mask, jax.core.Tracer) for _, mask in named):
        raise ValueError(
            "sparsity=None: which leaves are sparse must be known before tracing, but the "
            "initial masks are traced; pass a sparsity or a distribution besides"
        )
    shares = {path: 1 - float(np.mean(np.asarray(mask))) for path, mask in named}
    empty = [path for path, share in shares.items() if share == 1]
    if empty:
        raise ValueError(f"initial_masks: nothing is active in {_paths.listing(empty)}")
    sparsities = {path: share for path, share in shares.items() if share > 0}
    if named and not sparsities:
        raise ValueError(
            "nothing left to sparsify: every initial mask is all True; to start sparse training "
            "from dense masks, pass a distribution besides"
        )
    return sparsities
