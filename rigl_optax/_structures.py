"""Structures: which weights of a layer live and die together, and how such a group is scored.

Selection ranks groups; single weights are the first kind. Every method sees a grid of groups
in place of a layer, and its masks of the grid are expanded to masks of the weights.
"""

import dataclasses
import fractions
import math
from collections.abc import Mapping, Sequence
from typing import Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from rigl_optax import _distributions, _numbers, _paths
from rigl_optax._xla import _sharding

Pool = Literal["l1", "l2", "max"]


@dataclasses.dataclass(frozen=True)
class Unstructured:
    """Every weight is a group of its own: the default."""

    has_parts = False  # whether each part of a layer is ranked by itself
    min_salient = 0.0  # above 0 for parts that may lose all their weights to others

    def grid(self, shape: tuple[int, ...], path: str) -> tuple[int, ...]:
        """Shape of the grid of groups of a layer; raises if the layer has none."""
        del path
        return shape

    def parts(self, grid: tuple[int, ...]) -> int:
        """Number of axes in front of a layer's grid that count its parts."""
        del grid
        return 0

    def zeros(self, sparsity: float, grid: tuple[int, ...], path: str) -> int:
        """Inactive groups of a layer, or of each part of it; raises if there cannot be so many."""
        del path
        return _distributions.zeros_in(sparsity, math.prod(grid))

    def group_sizes(self, shape: tuple[int, ...]) -> np.ndarray:
        """Number of weights in each group, of the shape of the grid or broadcasting to it."""
        return np.ones((1,) * len(shape), np.int64)

    def pool(self, x: jax.Array) -> jax.Array:
        """Scores of the groups of one layer, float32; a score is like that of one weight."""
        return x.astype(jnp.float32)

    def mean(self, x: jax.Array) -> jax.Array:
        """Means of the groups of one layer, with their signs."""
        return self.pool(x)

    def groups(self, mask: jax.Array) -> jax.Array:
        """The mask of a layer's groups, of one that is the same throughout each group."""
        return mask

    def expand(self, mask: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """The mask of a layer's weights: the inverse of `groups`."""
        del shape
        return mask

    def misfit(self, mask: np.ndarray) -> str:
        """What is wrong with a mask of a layer's weights; empty if nothing is."""
        del mask
        return ""


@dataclasses.dataclass(frozen=True)
class Block:
    r"""Blocks of `rows` inputs by `cols` outputs: what real kernels are fast on.

    The last two axes of a kernel are its inputs and its outputs, as in Flax and Haiku; a block
    of a convolution has all taps of its channels. A group is scored by its mean magnitude
    (`l1`), its root mean square (`l2`), or its largest magnitude (`max`):

    .. math::
        \frac1n \sum_i |x_i|, \qquad \sqrt{\frac1n \sum_i x_i^2}, \qquad \max_i |x_i|

    A layer has `floor(s * groups)` inactive groups, and this number never changes. Nor does that of
    its weights, unless `pad` makes some blocks smaller: of g active ones there are then as many
    weights as in g blocks of the smallest size or more, and of the largest or less.

    Attributes:
      rows: Inputs (input channels) of a block.
      cols: Outputs (output channels) of a block.
      pool_by: How weights, and gradients, are pooled to the score of a block.
      pad: Whether layers that `rows` and `cols` do not divide have smaller blocks at their
        far edges, which count as any other; else they raise.

    Example:
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
        """Shape of the grid, [in blocks, out blocks]; raises if a layer does not divide."""
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
        """None: all blocks of a layer are ranked together."""
        del grid
        return 0

    def zeros(self, sparsity: float, grid: tuple[int, ...], path: str) -> int:
        """Inactive blocks of a layer."""
        del path
        return _distributions.zeros_in(sparsity, math.prod(grid))

    def group_sizes(self, shape: tuple[int, ...]) -> np.ndarray:
        """Number of weights in each block, [in blocks, out blocks]."""
        inputs, outputs = (
            np.diff(np.minimum(np.arange(0, size + step, step), size))
            for size, step in zip(shape[-2:], (self.rows, self.cols), strict=True)
        )
        return math.prod(shape[:-2]) * np.outer(inputs, outputs)

    def pool(self, x: jax.Array) -> jax.Array:
        """Scores of the blocks, [in blocks, out blocks]."""
        return self.score(*self._tiled(x), self.group_sizes(x.shape))

    def mean(self, x: jax.Array) -> jax.Array:
        """Means of the blocks, with their signs."""
        sizes = jnp.asarray(self.group_sizes(x.shape), jnp.float32)
        return jnp.sum(*self._tiled(x.astype(jnp.float32))) / sizes

    def score(self, x: jax.Array, axes: tuple[int, ...], sizes: jax.typing.ArrayLike) -> jax.Array:
        """Scores of blocks that lie along `axes`, float32.

        Args:
          x: Weights or gradients; zeros beyond the edges of a layer.
          axes: What is pooled.
          sizes: Number of weights in each block, of the shape that is left.

        Returns:
          float32, pooled in the precision of `x` if that is higher.
        """
        with jax.numpy_dtype_promotion("standard"):
            dtype = jnp.promote_types(x.dtype, jnp.float32)
        magnitudes = jnp.abs(x.astype(dtype))
        if self.pool_by == "max":
            return jnp.max(magnitudes, axes).astype(jnp.float32)
        number = jnp.asarray(sizes, dtype)
        if self.pool_by == "l1":
            return (jnp.sum(magnitudes, axes) / number).astype(jnp.float32)
        return jnp.sqrt(jnp.sum(magnitudes * magnitudes, axes) / number).astype(jnp.float32)

    def groups(self, mask: jax.Array) -> jax.Array:
        """Whether anything of each block is active."""
        return jnp.any(*self._tiled(mask))

    def expand(self, mask: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """Each entry of the grid for all weights of its block."""
        rows, cols = mask.shape
        wide = lax.broadcast_in_dim(mask, (rows, self.rows, cols, self.cols), (0, 2))
        # Axis by axis: of an array in parts no two can be merged at once.
        plane = wide.reshape(rows * self.rows, cols, self.cols)
        plane = plane.reshape(rows * self.rows, cols * self.cols)
        for axis, size in enumerate(shape[-2:]):
            if plane.shape[axis] > size:
                plane = lax.slice_in_dim(plane, 0, size, axis=axis)
        return jnp.broadcast_to(plane, shape)

    def misfit(self, mask: np.ndarray) -> str:
        """Whether blocks are active in part."""
        again = self.expand(self.groups(jnp.asarray(mask)), mask.shape)
        return "" if np.array_equal(mask, np.asarray(again)) else "groups are active in part"

    def _tiled(self, x: jax.Array) -> tuple[jax.Array, tuple[int, ...]]:
        """`x` as [*taps, in blocks, rows, out blocks, cols], and the axes within a block.

        Blocks at the far edges are filled up with zeros.
        """
        first = x.ndim - 2
        blocks = self.grid(x.shape, "a layer")
        for i, (number, size) in enumerate(zip(blocks, (self.rows, self.cols), strict=True)):
            axis = first + 2 * i
            missing = number * size - x.shape[axis]
            if missing:
                x = _sharding.gathered(x, axis)
                x = jnp.pad(x, [(0, missing if a == axis else 0) for a in range(x.ndim)])
            x = _sharding.split(x, axis, size)
        return x, (*range(first), first + 1, first + 3)


@dataclasses.dataclass(frozen=True)
class ConstantFanIn:
    r"""Single weights, as many for every unit: `inputs - floor(s * inputs)`.

    The last axis of a kernel counts its units; all others are inputs. Every unit of a layer costs
    the same, and its weights and their indices form a rectangle. A rewiring drops the smallest
    weights of the whole layer, and each unit grows as many as it lost; units of few large
    gradients too.

    With `min_salient` a rewiring may also ablate units, or revive them. Salient are the weights
    that the method would have active next if there were no structure: those it keeps, and those it
    would grow in the whole layer. A unit with

    .. math::
        |\{\text{salient weights of it}\}| < \text{min\_salient} \cdot k, \qquad
        k = \lfloor \text{active weights of the layer} / \text{units} \rfloor

    or with none loses all its weights, and the others grow by so many: a layer of N active weights
    and m units that stay gives each `floor(N / m)`, and one more to the `N mod m` with the most
    salient weights. N never changes. As many units stay as are needed to hold N weights, the most
    salient first; equal ones by their index. Ablated units are judged anew at each rewiring.

    Attributes:
      min_salient: The least share of a unit's fan-in that has to be salient, in [0, 1], to the
        nearest fraction with a denominator of at most 10,000; 0 ablates nothing. The authors have
        0.3 for convolutional networks, 0.05 for ResNet-18 on CIFAR-10. Outputs of a network are
        units too: give its last layer another structure by its pattern, or keep it dense.

    Example:
      >>> import jax.numpy as jnp, optax, rigl_optax
      >>> tx = rigl_optax.static_sparse(optax.sgd(0.1), 0.5, structure=rigl_optax.ConstantFanIn())
      >>> tx.init({"kernel": jnp.ones((6, 4))}).masks["kernel"].sum(0).tolist()
      [3, 3, 3, 3]

    References:
      Lasby et al., `Dynamic sparse training with structured sparsity
      <https://arxiv.org/abs/2305.02299>`_, 2024 (SRigL).
    """

    min_salient: float = 0.0

    has_parts = True

    def __post_init__(self) -> None:
        what = "a number from 0 (no ablation) to 1"
        share = _numbers.real("ConstantFanIn: min_salient", self.min_salient, what)
        if not 0 <= share <= 1:
            raise ValueError(f"ConstantFanIn: min_salient={share}: must be {what}")
        object.__setattr__(self, "min_salient", share)

    @property
    def salient_share(self) -> fractions.Fraction:
        """`min_salient` as it is compared: 0.3 is 3/10, in integers and on every device."""
        return fractions.Fraction(self.min_salient).limit_denominator(10_000)

    def grid(self, shape: tuple[int, ...], path: str) -> tuple[int, ...]:
        """Shape of the grid, [units, *window, in]."""
        if len(shape) < 2:
            raise ValueError(f"{self}: {path!r} has shape {shape}; a fan-in needs two axes")
        return shape[-1], *shape[:-1]

    def parts(self, grid: tuple[int, ...]) -> int:
        """The units."""
        del grid
        return 1

    def zeros(self, sparsity: float, grid: tuple[int, ...], path: str) -> int:
        """Inactive weights of each unit."""
        del path
        return _distributions.zeros_in(sparsity, math.prod(grid[1:]))

    def group_sizes(self, shape: tuple[int, ...]) -> np.ndarray:
        """One weight in each group."""
        return np.ones((1,) * len(shape), np.int64)

    def pool(self, x: jax.Array) -> jax.Array:
        """The weights, float32, [units, *window, in]."""
        return self.groups(x.astype(jnp.float32))

    def mean(self, x: jax.Array) -> jax.Array:
        """The same: a group is one weight."""
        return self.pool(x)

    def groups(self, mask: jax.Array) -> jax.Array:
        """[*window, in, out] as [units, *window, in]."""
        return jnp.moveaxis(mask, -1, 0)

    def expand(self, mask: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """The inverse of `groups`."""
        del shape
        return jnp.moveaxis(mask, 0, -1)

    def misfit(self, mask: np.ndarray) -> str:
        """Whether units differ in their fan-in; by more than 1, where units may be ablated."""
        fan_in = mask.reshape(-1, mask.shape[-1]).sum(0)
        if not self.min_salient:
            return "" if len(set(fan_in.tolist())) == 1 else "units differ in their fan-in"
        left = fan_in[fan_in > 0]
        even = not left.size or left.max() - left.min() <= 1
        return "" if even else "units that are not ablated differ in their fan-in by more than 1"


@dataclasses.dataclass(frozen=True)
class NM:
    """n of every m weights that follow each other along the inputs of a unit: 2:4 and others.

    Inputs are counted within a tap of a convolution, as a matrix product meets them. The sparsity
    of such a layer is `1 - n / m`, and its distribution has to say so: `uniform(0.5)` for 2:4.
    A rewiring drops the smallest weights of the whole layer, and each group grows as many as it
    lost.

    Attributes:
      n: Active weights of a group.
      m: Weights of a group; divides the inputs of every layer.

    Example:
      >>> import jax.numpy as jnp, optax, rigl_optax
      >>> half = rigl_optax.uniform(0.5)
      >>> tx = rigl_optax.static_sparse(optax.sgd(0.1), half, structure=rigl_optax.NM(2, 4))
      >>> mask = tx.init({"kernel": jnp.ones((8, 3))}).masks["kernel"]
      >>> mask.reshape(2, 4, 3).sum(1).tolist()
      [[2, 2, 2], [2, 2, 2]]
    """

    n: int
    m: int

    has_parts = True
    min_salient = 0.0

    def __post_init__(self) -> None:
        for name in ("n", "m"):
            object.__setattr__(self, name, _numbers.integer(f"NM: {name}", getattr(self, name)))
        if not 1 <= self.n <= self.m:
            raise ValueError(f"NM({self.n}, {self.m}): must be integers, 1 <= n <= m")

    def grid(self, shape: tuple[int, ...], path: str) -> tuple[int, ...]:
        """Shape of the grid, [units, *window, in / m, m]."""
        if len(shape) < 2:
            raise ValueError(f"{self}: {path!r} has shape {shape}; n:m needs two axes")
        if shape[-2] % self.m:
            raise ValueError(
                f"{self}: {self.m} does not divide the {shape[-2]} inputs of {path!r}; give this "
                "layer another structure by its pattern, or keep it dense"
            )
        return shape[-1], *shape[:-2], shape[-2] // self.m, self.m

    def parts(self, grid: tuple[int, ...]) -> int:
        """All axes but the last."""
        return len(grid) - 1

    def zeros(self, sparsity: float, grid: tuple[int, ...], path: str) -> int:
        """Inactive weights of each group; raises if another sparsity is asked for."""
        del grid
        if sparsity and abs(sparsity - (1 - self.n / self.m)) > 1e-6:
            raise ValueError(
                f"{self}: the sparsity of {path!r} is {sparsity:.6g}, must be "
                f"{1 - self.n / self.m:.6g}: uniform({1 - self.n / self.m:.6g}), or an override"
            )
        return self.m - self.n if sparsity else 0

    def group_sizes(self, shape: tuple[int, ...]) -> np.ndarray:
        """One weight in each group that is ranked."""
        return np.ones((1,) * (len(shape) + 1), np.int64)

    def pool(self, x: jax.Array) -> jax.Array:
        """The weights, float32, [units, *window, in / m, m]."""
        return self.groups(x.astype(jnp.float32))

    def mean(self, x: jax.Array) -> jax.Array:
        """The same: a group is one weight."""
        return self.pool(x)

    def groups(self, mask: jax.Array) -> jax.Array:
        """[*window, in, out] as [units, *window, in / m, m]."""
        return _sharding.split(jnp.moveaxis(mask, -1, 0), mask.ndim - 1, self.m)

    def expand(self, mask: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """The inverse of `groups`."""
        return jnp.moveaxis(mask.reshape(shape[-1], *shape[:-1]), 0, -1)

    def misfit(self, mask: np.ndarray) -> str:
        """Whether a group has more or less than n."""
        active = np.asarray(self.groups(jnp.asarray(mask))).sum(-1)
        return "" if (active == self.n).all() else f"groups of {self.m} have not {self.n} each"


Structure: TypeAlias = Unstructured | Block | NM | ConstantFanIn
# One for all sparse layers, or by regular expressions of their paths; others are unstructured.
Structures: TypeAlias = Structure | Mapping[str, Structure]

UNSTRUCTURED = Unstructured()
_KINDS = "Unstructured(), Block(rows, cols), NM(n, m) or ConstantFanIn()"


def check(structure: Structures, ablates: bool = True) -> None:
    """Raises a TypeError or ValueError unless this is a structure, or structures by pattern.

    Args:
      structure: What the public methods take.
      ablates: Whether the method can ablate units.
    """
    named: Mapping[str, Structure] = {}
    if isinstance(structure, Structure):
        named = {"": structure}
    elif isinstance(structure, Mapping):
        named = structure
    else:
        raise TypeError(
            f"structure={structure!r}: must be {_KINDS}, or a mapping from patterns of paths to "
            "those"
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


def by_path(structure: Structures, paths: Sequence[str]) -> dict[str, Structure]:
    """The structure of each sparse leaf.

    Args:
      structure: What the public methods take.
      paths: Of the sparse leaves.

    Raises:
      ValueError: If a pattern matches no path, or two match one.
    """
    if not isinstance(structure, Mapping):
        return dict.fromkeys(paths, structure)
    patterns = _paths.pattern_of_each(structure, paths, "structure")
    named = {path: structure[pattern] for path, pattern in patterns.items()}
    return dict.fromkeys(paths, UNSTRUCTURED) | named
