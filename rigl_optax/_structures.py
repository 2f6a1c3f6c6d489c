"""Groups the weights of a layer that are active or inactive together, and scores the groups.

Methods rank groups, not weights. A layer is brought to a grid of groups, the method chooses among
them, and its mask of the grid is expanded to a mask of the weights. Without a structure each
weight is a group.
"""

import dataclasses
import fractions
import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from rigl_optax import _distributions, _numbers, _paths
from rigl_optax._ranking import _scores
from rigl_optax._xla import _sharding

Pool = Literal["l1", "l2", "max"]


@dataclasses.dataclass(frozen=True)
class Unstructured:
    """Makes every weight a group of its own: the default.

    Use it in a mapping of structures, for layers that are to have none.
    """

    has_parts = False  # whether the parts of a layer are ranked separately
    min_salient = 0.0  # above 0 if units may be ablated
    transposable = False  # whether masks are valid for the transposed kernel too

    def grid(self, shape: tuple[int, ...], path: str) -> tuple[int, ...]:
        """Returns the shape of a layer's grid of groups.

        Args:
          shape: Shape of one layer as [*window, in, out].
          path: The leaf's name, for errors.

        Raises:
          ValueError: If the structure does not fit the layer.
        """
        del path
        return shape

    def parts(self, grid: tuple[int, ...]) -> int:
        """Returns how many of the first axes of a layer's grid count its parts."""
        del grid
        return 0

    def zeros(self, sparsity: float, grid: tuple[int, ...], path: str) -> int:
        """Returns the number of inactive groups of a layer, or of each of its parts.

        Raises:
          ValueError: If the structure does not allow this sparsity.
        """
        del path
        return _distributions.zeros_in(sparsity, math.prod(grid))

    def group_sizes(self, shape: tuple[int, ...]) -> np.ndarray:
        """Returns the number of weights in each group, int64; it broadcasts to the grid."""
        return np.ones((1,) * len(shape), np.int64)

    def pool(self, x: jax.Array) -> jax.Array:
        """Returns scores of the groups of one layer, float32, on the scale of one weight's."""
        return x.astype(jnp.float32)

    def mean(self, x: jax.Array) -> jax.Array:
        """Returns the signed means of the groups of one layer, float32."""
        return self.pool(x)

    def groups(self, mask: jax.Array) -> jax.Array:
        """Returns the mask of a layer's groups, from a mask that is the same within each group."""
        return mask

    def expand(self, mask: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """Returns the mask of a layer's weights from that of its groups."""
        del shape
        return mask

    def misfit(self, mask: np.ndarray) -> str:
        """Says why a mask of a layer's weights does not fit the structure; empty if it does."""
        del mask
        return ""


@dataclasses.dataclass(frozen=True)
class Block:
    r"""Groups blocks of `rows` inputs by `cols` outputs.

    Use it if a sparse step has to be faster than a dense one: `rigl_optax.condensed` stores and
    multiplies only the active blocks. Blocks cost accuracy at the same sparsity; docs/structures.md
    has measurements.

    The last two axes of a kernel are its inputs and its outputs, as in Flax and Haiku; a block
    of a convolution has all taps of its channels. A block is scored by its mean magnitude
    (`l1`), its root mean square (`l2`), or its largest magnitude (`max`):

    $$
    \frac1n \sum_i |x_i|, \qquad \sqrt{\frac1n \sum_i x_i^2}, \qquad \max_i |x_i|
    $$

    A layer has `floor(s * groups)` inactive blocks, and this number never changes. The number of
    active weights does not change either, unless `pad` makes some blocks smaller: then g active
    blocks have at least the weights of the g smallest blocks, and at most those of the g largest.

    Attributes:
      rows: Number of inputs (input channels) of a block.
      cols: Number of outputs (output channels) of a block.
      pool_by: How weights and gradients are pooled to the score of a block: `l1`, `l2` or `max`.
      pad: Whether a layer that `rows` and `cols` do not divide gets smaller blocks at its far
        edges, which count as any other block. If False, `init` raises for such a layer.

    Examples:
      >>> import jax.numpy as jnp, optax, rigl_optax
      >>> tx = rigl_optax.rigl(optax.sgd(0.1), 0.75, end=100, structure=rigl_optax.Block(2, 4))
      >>> mask = tx.init({"kernel": jnp.ones((4, 8))}).masks["kernel"]
      >>> int(mask.sum()), sorted(mask.sum(1).tolist())
      (8, [0, 0, 4, 4])
    """

    rows: int
    cols: int
    pool_by: Pool = "l1"
    pad: bool = False

    has_parts = False
    transposable = False
    min_salient = 0.0

    def __post_init__(self) -> None:
        for name in ("rows", "cols"):
            value = _numbers.integer(f"Block: {name}", getattr(self, name), least=1)
            object.__setattr__(self, name, value)
        if self.pool_by not in get_args(Pool):
            raise ValueError(
                f"Block: pool_by={self.pool_by!r}: must be one of {', '.join(get_args(Pool))}"
            )

    def grid(self, shape: tuple[int, ...], path: str) -> tuple[int, ...]:
        """Returns the shape of the grid, [in blocks, out blocks].

        Raises:
          ValueError: If the layer has fewer than two axes, or blocks do not divide it.
        """
        if len(shape) < 2:
            raise ValueError(f"{self}: {path!r} has shape {shape}; blocks need two axes")
        if not self.pad and (shape[-2] % self.rows or shape[-1] % self.cols):
            raise ValueError(
                f"{self}: does not divide {path!r} of {shape[-2]} inputs x {shape[-1]} outputs; "
                "give this layer another structure by its pattern (Unstructured() for none), "
                "keep it dense, or allow smaller blocks at the edges with pad=True"
            )
        return -(-shape[-2] // self.rows), -(-shape[-1] // self.cols)

    def parts(self, grid: tuple[int, ...]) -> int:
        """Returns 0: all blocks of a layer are ranked together."""
        del grid
        return 0

    def zeros(self, sparsity: float, grid: tuple[int, ...], path: str) -> int:
        """Returns the number of inactive blocks of a layer."""
        del path
        return _distributions.zeros_in(sparsity, math.prod(grid))

    def group_sizes(self, shape: tuple[int, ...]) -> np.ndarray:
        """Returns the number of weights in each block, [in blocks, out blocks]."""
        inputs, outputs = (
            np.diff(np.minimum(np.arange(0, size + step, step), size))
            for size, step in zip(shape[-2:], (self.rows, self.cols), strict=True)
        )
        return math.prod(shape[:-2]) * np.outer(inputs, outputs)

    def pool(self, x: jax.Array) -> jax.Array:
        """Returns the scores of the blocks, float32 [in blocks, out blocks]."""
        return self.score(*self._tiled(x), self.group_sizes(x.shape))

    def mean(self, x: jax.Array) -> jax.Array:
        """Returns the signed means of the blocks, float32 [in blocks, out blocks]."""
        sizes = jnp.asarray(self.group_sizes(x.shape), jnp.float32)
        return jnp.sum(*self._tiled(x.astype(jnp.float32))) / sizes

    def score(self, x: jax.Array, axes: tuple[int, ...], sizes: jax.typing.ArrayLike) -> jax.Array:
        """Pools `x` along `axes` to scores of blocks.

        Args:
          x: Weights or gradients; zeros beyond the edges of a layer.
          axes: The axes within a block.
          sizes: Number of weights in each block, of the shape of the other axes.

        Returns:
          float32 array of the other axes, computed in the precision of `x` if that is higher.
        """
        with jax.numpy_dtype_promotion("standard"):
            dtype = jnp.promote_types(x.dtype, jnp.float32)
        # float64 weights are pooled in float64: rounding first could make scores equal.
        magnitudes = jnp.abs(x.astype(dtype))
        if self.pool_by == "max":
            return jnp.max(magnitudes, axes).astype(jnp.float32)
        number = jnp.asarray(sizes, dtype)
        if self.pool_by == "l1":
            return (jnp.sum(magnitudes, axes) / number).astype(jnp.float32)
        return jnp.sqrt(jnp.sum(magnitudes * magnitudes, axes) / number).astype(jnp.float32)

    def groups(self, mask: jax.Array) -> jax.Array:
        """Returns whether any weight of each block is active."""
        return jnp.any(*self._tiled(mask))

    def expand(self, mask: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """Repeats each entry of the grid for all weights of its block."""
        rows, cols = mask.shape
        wide = lax.broadcast_in_dim(mask, (rows, self.rows, cols, self.cols), (0, 2))
        # One axis at a time: a sharded array cannot have two pairs of axes merged at once.
        plane = wide.reshape(rows * self.rows, cols, self.cols)
        plane = plane.reshape(rows * self.rows, cols * self.cols)
        for axis, size in enumerate(shape[-2:]):
            if plane.shape[axis] > size:
                plane = lax.slice_in_dim(plane, 0, size, axis=axis)
        return jnp.broadcast_to(plane, shape)

    def misfit(self, mask: np.ndarray) -> str:
        """Says so if a block is active in part."""
        again = self.expand(self.groups(jnp.asarray(mask)), mask.shape)
        return "" if np.array_equal(mask, np.asarray(again)) else "groups are active in part"

    def _tiled(self, x: jax.Array) -> tuple[jax.Array, tuple[int, ...]]:
        """Returns `x` as [*taps, in blocks, rows, out blocks, cols], and the axes within a block.

        Blocks at the far edges are padded with zeros.
        """
        first = x.ndim - 2
        blocks = self.grid(x.shape, "a layer")
        for i, (number, size) in enumerate(zip(blocks, (self.rows, self.cols), strict=True)):
            axis = first + 2 * i
            missing = number * size - x.shape[axis]
            if missing:
                # Padding shifts entries between devices, so an explicit axis is gathered first.
                x = _sharding.gathered(x, axis)
                x = jnp.pad(x, [(0, missing if a == axis else 0) for a in range(x.ndim)])
            x = _sharding.split(x, axis, size)
        return x, (*range(first), first + 1, first + 3)


@dataclasses.dataclass(frozen=True)
class ConstantFanIn:
    r"""Gives every unit the same number of active weights: `inputs - floor(s * inputs)`.

    Use it if units have to cost the same: the weights of a layer and their indices then form
    rectangles, [units, fan-in]. It restricts the masks less than `Block` and `NM` do.

    The last axis of a kernel counts its units; all others are inputs. A rewiring drops the smallest
    weights of the whole layer, and each unit grows as many as it lost, even if its gradients are
    small.

    With `min_salient` a rewiring may also ablate units, or revive them. A weight is salient if the
    method would have it active next if there were no structure: it is kept, or it is among the
    weights that would grow in the whole layer. A unit with

    $$
    |\{\text{salient weights of it}\}| < \text{min\_salient} \cdot k, \qquad
    k = \lfloor \text{active weights of the layer} / \text{units} \rfloor
    $$

    or with no salient weight loses all its weights, and the other units get them: with N active
    weights in the layer and m units that stay, each has `floor(N / m)`, and the `N mod m` units
    with the most salient weights have one more. N never changes. At least as many units stay as
    are needed to hold N weights: those with the most salient weights, then those of lower index.
    A rewiring may revive units that an earlier one ablated.

    Attributes:
      min_salient: The least share of a unit's fan-in that has to be salient, in [0, 1], rounded
        to the nearest fraction with a denominator of at most 10,000; 0 ablates no unit. The
        authors use 0.3 for convolutional networks, 0.05 for ResNet-18 on CIFAR-10. The outputs of
        a network are units too: give its last layer another structure by its pattern, or keep it
        dense.

    Examples:
      >>> import jax.numpy as jnp, optax, rigl_optax
      >>> tx = rigl_optax.static_sparse(optax.sgd(0.1), 0.5, structure=rigl_optax.ConstantFanIn())
      >>> tx.init({"kernel": jnp.ones((6, 4))}).masks["kernel"].sum(0).tolist()
      [3, 3, 3, 3]

    References:
      Lasby et al., [Dynamic sparse training with structured
      sparsity](https://arxiv.org/abs/2305.02299), 2024 (SRigL).
    """

    min_salient: float = 0.0

    has_parts = True
    transposable = False

    def __post_init__(self) -> None:
        what = "a number from 0 (no ablation) to 1"
        share = _numbers.real("ConstantFanIn: min_salient", self.min_salient, what)
        if not 0 <= share <= 1:
            raise ValueError(f"ConstantFanIn: min_salient={share}: must be {what}")
        object.__setattr__(self, "min_salient", share)

    @property
    def salient_share(self) -> fractions.Fraction:
        """Returns `min_salient` as a fraction: integers compare alike on every device."""
        return fractions.Fraction(self.min_salient).limit_denominator(10_000)

    def grid(self, shape: tuple[int, ...], path: str) -> tuple[int, ...]:
        """Returns the shape of the grid, [units, *window, in].

        Raises:
          ValueError: If the layer has fewer than two axes.
        """
        if len(shape) < 2:
            raise ValueError(f"{self}: {path!r} has shape {shape}; a fan-in needs two axes")
        return shape[-1], *shape[:-1]

    def parts(self, grid: tuple[int, ...]) -> int:
        """Returns 1: each unit is a part."""
        del grid
        return 1

    def zeros(self, sparsity: float, grid: tuple[int, ...], path: str) -> int:
        """Returns the number of inactive weights of each unit."""
        del path
        return _distributions.zeros_in(sparsity, math.prod(grid[1:]))

    def group_sizes(self, shape: tuple[int, ...]) -> np.ndarray:
        """Returns ones: a group is a single weight."""
        return np.ones((1,) * len(shape), np.int64)

    def pool(self, x: jax.Array) -> jax.Array:
        """Returns the weights, float32 [units, *window, in]."""
        return self.groups(x.astype(jnp.float32))

    def mean(self, x: jax.Array) -> jax.Array:
        """Returns what `pool` returns: a group is a single weight."""
        return self.pool(x)

    def groups(self, mask: jax.Array) -> jax.Array:
        """Transposes [*window, in, out] to [units, *window, in]."""
        return jnp.moveaxis(mask, -1, 0)

    def expand(self, mask: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """Transposes the grid back to [*window, in, out]: the inverse of `groups`."""
        del shape
        return jnp.moveaxis(mask, 0, -1)

    def misfit(self, mask: np.ndarray) -> str:
        """Says so if units differ in their fan-in, or by more than 1 if units may be ablated."""
        fan_in = mask.reshape(-1, mask.shape[-1]).sum(0)
        if not self.min_salient:
            return "" if len(set(fan_in.tolist())) == 1 else "units differ in their fan-in"
        left = fan_in[fan_in > 0]
        even = not left.size or left.max() - left.min() <= 1
        return "" if even else "units that are not ablated differ in their fan-in by more than 1"


@dataclasses.dataclass(frozen=True)
class NM:
    """Keeps n of every m consecutive inputs of a unit active: 2:4 and others.

    Use it if the network is to run on hardware that multiplies 2:4 sparse matrices.

    Inputs are counted within a tap of a convolution. The sparsity of such a layer is `1 - n / m`,
    and the distribution has to give the same: `uniform(0.5)` for 2:4. A rewiring drops the smallest
    weights of the whole layer, and each m inputs grow as many as they lost.

    Attributes:
      n: Number of active weights among m consecutive inputs.
      m: Number of consecutive inputs; divides the inputs of every layer.
      transposable: Whether n of every m consecutive outputs of an input are active too, so that
        the backward pass multiplies such a matrix as well. With m up to 4, which divides the
        outputs too, for `dnw` and `static_sparse`. Of each m by m weights the mask of the largest
        sum is taken, of all 90 for 2:4; magnitudes count in units of 2**-20 of the largest.

    Examples:
      >>> import jax.numpy as jnp, optax, rigl_optax
      >>> half = rigl_optax.uniform(0.5)
      >>> tx = rigl_optax.static_sparse(optax.sgd(0.1), half, structure=rigl_optax.NM(2, 4))
      >>> mask = tx.init({"kernel": jnp.ones((8, 3))}).masks["kernel"]
      >>> mask.reshape(2, 4, 3).sum(1).tolist()
      [[2, 2, 2], [2, 2, 2]]
    """

    n: int
    m: int
    transposable: bool = dataclasses.field(default=False, repr=False)

    has_parts = True
    min_salient = 0.0

    def __post_init__(self) -> None:
        for name in ("n", "m"):
            object.__setattr__(self, name, _numbers.integer(f"NM: {name}", getattr(self, name)))
        if not 1 <= self.n <= self.m:
            raise ValueError(f"NM({self.n}, {self.m}): must be integers, 1 <= n <= m")
        if not isinstance(self.transposable, bool):
            raise TypeError(f"NM: transposable={self.transposable!r}: must be True or False")
        if self.transposable and self.m > _LARGEST_SQUARE:
            raise ValueError(
                f"NM({self.n}, {self.m}, transposable=True): m must be at most {_LARGEST_SQUARE}, "
                "since all masks of m by m weights are compared"
            )

    def grid(self, shape: tuple[int, ...], path: str) -> tuple[int, ...]:
        """Returns the shape of the grid, [units, *window, in / m, m].

        Raises:
          ValueError: If the layer has fewer than two axes, or m does not divide its inputs.
        """
        if len(shape) < 2:
            raise ValueError(f"{self}: {path!r} has shape {shape}; n:m needs two axes")
        if shape[-2] % self.m:
            raise ValueError(
                f"{self}: {self.m} does not divide the {shape[-2]} inputs of {path!r}; give this "
                "layer another structure by its pattern, or keep it dense"
            )
        if self.transposable and shape[-1] % self.m:
            raise ValueError(
                f"{self}, transposable: {self.m} does not divide the {shape[-1]} outputs of "
                f"{path!r}; give this layer another structure by its pattern, or keep it dense"
            )
        return shape[-1], *shape[:-2], shape[-2] // self.m, self.m

    def parts(self, grid: tuple[int, ...]) -> int:
        """Returns the number of all axes but the last: each m inputs are a part."""
        return len(grid) - 1

    def zeros(self, sparsity: float, grid: tuple[int, ...], path: str) -> int:
        """Returns the number of inactive weights among m inputs.

        Raises:
          ValueError: If the sparsity is neither 0 nor `1 - n / m`.
        """
        del grid
        if sparsity and abs(sparsity - (1 - self.n / self.m)) > 1e-6:
            raise ValueError(
                f"{self}: the sparsity of {path!r} is {sparsity:.6g}, must be "
                f"{1 - self.n / self.m:.6g}: uniform({1 - self.n / self.m:.6g}), or an override"
            )
        return self.m - self.n if sparsity else 0

    def group_sizes(self, shape: tuple[int, ...]) -> np.ndarray:
        """Returns ones: what is ranked is a single weight."""
        return np.ones((1,) * (len(shape) + 1), np.int64)

    def pool(self, x: jax.Array) -> jax.Array:
        """Returns the weights, float32 [units, *window, in / m, m]."""
        return self.groups(x.astype(jnp.float32))

    def mean(self, x: jax.Array) -> jax.Array:
        """Returns what `pool` returns: a group is a single weight."""
        return self.pool(x)

    def groups(self, mask: jax.Array) -> jax.Array:
        """Transposes [*window, in, out] to [units, *window, in / m, m]."""
        return _sharding.split(jnp.moveaxis(mask, -1, 0), mask.ndim - 1, self.m)

    def expand(self, mask: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """Transposes the grid back to [*window, in, out]: the inverse of `groups`."""
        return jnp.moveaxis(mask.reshape(shape[-1], *shape[:-1]), 0, -1)

    def misfit(self, mask: np.ndarray) -> str:
        """Says so if some m inputs have not n active weights."""
        active = np.asarray(self.groups(jnp.asarray(mask))).sum(-1)
        if self.transposable and (active == self.n).all():
            of_outputs = mask.reshape(*mask.shape[:-1], mask.shape[-1] // self.m, self.m)
            if not (of_outputs.sum(-1) == self.n).all():
                return f"groups of {self.m} outputs have not {self.n} each"
        return "" if (active == self.n).all() else f"groups of {self.m} have not {self.n} each"

    def choose(self, scores: jax.Array) -> jax.Array:
        """Chooses the mask of a transposable layer: of each m by m weights that of largest sum.

        Args:
          scores: int32 from `magnitude_scores`, on the grid.

        Returns:
          Bool, on the grid. Of equal sums the first mask is taken, in the order of their entries.
        """
        m, patterns = self.m, _square_masks(self.n, self.m)
        # [units / m, *window, in / m, m units, m inputs]
        whole = _sharding.whole(scores)
        squares = jnp.moveaxis(whole.reshape(-1, m, *whole.shape[1:]), 1, -2)
        flat = squares.reshape(*squares.shape[:-2], m * m)
        units = _scores.units_of_largest(flat, _SQUARE_BITS, axis=-1)
        # Sums stay below 2**24, so that float32 holds them exactly, in any order.
        table = jnp.asarray(patterns, jnp.float32)
        sums = jnp.matmul(units.astype(jnp.float32), table.T, precision=lax.Precision.HIGHEST)
        best = jax.nn.one_hot(jnp.argmax(sums, -1), len(patterns), dtype=jnp.float32)
        chosen = (jnp.matmul(best, table) > 0.5).reshape(squares.shape)
        return _sharding.like(jnp.moveaxis(chosen, -2, 1).reshape(scores.shape), scores)


Structure: TypeAlias = Unstructured | Block | NM | ConstantFanIn
# One structure for all sparse layers, or `{pattern: structure}`, where the patterns are searched in
# the paths and layers without a match are unstructured.
Structures: TypeAlias = Structure | Mapping[str, Structure]

UNSTRUCTURED = Unstructured()
_LARGEST_SQUARE = 4
_SQUARE_BITS = 20  # of a magnitude; a sum of at most 16 is below 2**24
_KINDS = "Unstructured(), Block(rows, cols), NM(n, m) or ConstantFanIn()"


@functools.cache
def _square_masks(n: int, m: int) -> np.ndarray:
    """Lists all masks of m by m weights with n in each row and column, bool [masks, m * m]."""
    rows = [np.isin(range(m), chosen) for chosen in itertools.combinations(range(m), n)]
    masks = [np.stack(each) for each in itertools.product(rows, repeat=m)]
    return np.stack([x.reshape(-1) for x in masks if (x.sum(0) == n).all()])


def check(structure: Structures, ablates: bool = True, transposes: bool = False) -> None:
    """Checks the argument `structure` of a method.

    Args:
      structure: A structure, or `{pattern: structure}`.
      ablates: Whether the method can ablate units.
      transposes: Whether it keeps masks transposable.

    Raises:
      TypeError: If it is neither.
      ValueError: If a pattern is malformed, or a structure needs what the method cannot do.
    """
    named: Mapping[str, Structure] = {}
    if isinstance(structure, Structure):
        named = {"": structure}
    elif isinstance(structure, Mapping):
        named = structure
    else:
        raise TypeError(
            f"structure={structure!r}: must be {_KINDS}, or a mapping from patterns of paths to "
            "such structures"
        )
    for pattern, one in named.items():
        _paths.compile_pattern(pattern, "structure")
        if not isinstance(one, Structure):
            raise TypeError(f"structure[{pattern!r}]={one!r}: must be {_KINDS}")
        if one.min_salient and not ablates:
            raise ValueError(
                f"structure: {one}: this method ablates no units; rigl, "
                "sparse_evolutionary_training and sparse_momentum do"
            )
        if isinstance(one, NM) and one.transposable and not transposes:
            raise ValueError(
                f"structure: {one} with transposable=True: this method ranks each {one.m} inputs "
                "alone; dnw and static_sparse keep masks transposable"
            )


def by_path(structure: Structures, paths: Sequence[str]) -> dict[str, Structure]:
    """Returns the structure of each sparse leaf.

    Args:
      structure: A structure, or `{pattern: structure}`.
      paths: Paths of the sparse leaves.

    Returns:
      `{path: structure}`; leaves that no pattern matches are unstructured.

    Raises:
      ValueError: If a pattern matches no path, or two match one.
    """
    if not isinstance(structure, Mapping):
        return dict.fromkeys(paths, structure)
    patterns = _paths.pattern_of_each(structure, paths, "structure")
    named = {path: structure[pattern] for path, pattern in patterns.items()}
    return dict.fromkeys(paths, UNSTRUCTURED) | named
