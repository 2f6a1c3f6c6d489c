"""Packs sparse leaves side by side into one array, so that one kernel ranks a whole model.

With a kernel for each leaf, XLA compiles far longer and launches many more kernels:
`benchmarks/update_overhead.py` prints the seconds of compilation for ResNet-50. Leaves that may be
sharded are not packed, since that would gather them (`tests/core/test_no_gather.py`).
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# The shape of a row: large enough that there are few rows, small enough that small leaves need
# little padding. XLA's CPU backend reduces up to 32 entries in one pass, and when it reduces the
# axis before the last it adds whole vectors.
ROW = (32, 128)
_ENTRIES = math.prod(ROW)


class RankingIds(NamedTuple):
    """The ranking that each row of an array belongs to.

    `ids` has as many axes as the array has leading axes that count rows; if `ids` is a scalar, the
    whole array is one row. A ranking is a layer (a leaf, or a slice of a stacked one), or a part of
    a layer.

    Attributes:
      ids: int32 array [], [rows] or [layers, rows, ...]: the number of the ranking, ascending.
      starts: int32 array of the same shape: how many entries of that ranking earlier rows hold.
    """

    ids: np.ndarray
    starts: np.ndarray


class Packing(NamedTuple):
    """How the sparse leaves of a tree are laid out for ranking; static under jit.

    Attributes:
      shapes: Shapes of the leaves.
      leading: For each leaf, how many of its first axes count rankings: 0; 1 if it is a stack of
        layers; more if layers have parts.
      is_packed: Whether `pack` makes one array of all leaves.
      in_parts: Whether a layer has many rankings, each of them a row of its own.
    """

    shapes: tuple[tuple[int, ...], ...]
    leading: tuple[int, ...]
    is_packed: bool
    in_parts: bool = False

    @property
    def rankings_per_leaf(self) -> list[int]:
        """Returns the number of rankings in each leaf."""
        return [
            math.prod(shape[:leading])
            for shape, leading in zip(self.shapes, self.leading, strict=True)
        ]

    @property
    def ranking_ids(self) -> list[RankingIds]:
        """Returns the rankings of the rows of each array that `pack` returns."""
        first = np.cumsum([0, *self.rankings_per_leaf]).astype(np.int32)
        if not self.is_packed:
            leaves = zip(self.shapes, self.leading, strict=True)
            fronts = [shape[:leading] for shape, leading in leaves]
            spans = zip(first[:-1], self.rankings_per_leaf, fronts, strict=True)
            ids_of_leaves = [
                np.arange(i, i + n, dtype=np.int32).reshape(front) for i, n, front in spans
            ]
            return [RankingIds(ids, np.zeros_like(ids)) for ids in ids_of_leaves]
        per_layer = [self._rows_of(i) for i in range(len(self.shapes))]
        repeats = np.repeat(per_layer, self.rankings_per_leaf)
        ids = np.repeat(np.arange(first[-1], dtype=np.int32), repeats)
        starts = np.concatenate([np.arange(n, dtype=np.int32) * _ENTRIES for n in repeats])
        return [RankingIds(ids, starts)]

    def one_ranking(self) -> list[RankingIds]:
        """Returns `ranking_ids` with all layers in one ranking; ties go to the earlier leaf.

        Raises:
          ValueError: If there are more than 2**31 - 1 entries, which int32 cannot count.
        """
        sizes = [math.prod(shape) for shape in self.packed_shapes()]
        if sum(sizes) > np.iinfo(np.int32).max:
            raise ValueError(
                f"{sum(sizes)} entries in one ranking: must be at most {np.iinfo(np.int32).max} "
                "(2**31 - 1)"
            )
        first = np.cumsum([0, *sizes[:-1]])
        joined = []
        for start, size, ranking_ids in zip(first, sizes, self.ranking_ids, strict=True):
            number = max(ranking_ids.ids.size, 1)
            starts = start + np.arange(number) * (size // number)
            joined.append(
                RankingIds(
                    np.zeros_like(ranking_ids.ids),
                    starts.astype(np.int32).reshape(ranking_ids.ids.shape),
                )
            )
        return joined

    def rankings(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns int32 [rankings] twice: the leaf of each ranking, and its first index there."""
        leaves = np.repeat(np.arange(len(self.shapes), dtype=np.int32), self.rankings_per_leaf)
        layer = np.concatenate([np.arange(n, dtype=np.int32) for n in self.rankings_per_leaf])
        return leaves, layer * self.sizes()

    def sizes(self) -> np.ndarray:
        """Returns the number of entries of each ranking, int32 [rankings]."""
        of_leaf = [
            math.prod(s) // n for s, n in zip(self.shapes, self.rankings_per_leaf, strict=True)
        ]
        return np.repeat(np.asarray(of_leaf, np.int32), self.rankings_per_leaf)

    def per_row(self, vector: jax.Array) -> jax.Array | list[jax.Array]:
        """Brings a vector [rankings] to the form that `top_k` takes: as it is, or split by row."""
        if not self.in_parts:
            return vector
        pieces = jnp.split(vector, np.cumsum(self.rankings_per_leaf)[:-1])
        return [
            piece.reshape(ranking_ids.ids.shape)
            for piece, ranking_ids in zip(pieces, self.ranking_ids, strict=True)
        ]

    def packed_shapes(self) -> list[tuple[int, ...]]:
        """Returns the shapes of the arrays that `pack` returns."""
        if not self.is_packed:
            return list(self.shapes)
        return [(len(self.ranking_ids[0].ids), *ROW)]

    def pack(self, arrays: Sequence[jax.Array], fill: float | bool) -> list[jax.Array]:
        """Packs all entries into one array [rows, *ROW], padded with `fill`, if `is_packed`.

        Args:
          arrays: One array for each leaf, of the shapes in `shapes`.
          fill: The value of the padding.

        Returns:
          A list with one array; or `arrays` as they are, if leaves are not packed.
        """
        if not self.is_packed:
            return list(arrays)
        # Each ranking begins a row of its own, so that a row has one threshold.
        parts = []
        for i, (array, layers) in enumerate(zip(arrays, self.rankings_per_leaf, strict=True)):
            flat = array.reshape(layers, -1)
            padding = self._rows_of(i) * _ENTRIES - flat.shape[1]
            if padding:
                flat = jnp.pad(flat, ((0, 0), (0, padding)), constant_values=fill)
            parts.append(flat.reshape(-1, *ROW))
        return [jnp.concatenate(parts)]

    def unpack(self, arrays: Sequence[jax.Array]) -> list[jax.Array]:
        """Brings the arrays of `pack` back to the shapes of the leaves."""
        if not self.is_packed:
            return list(arrays)
        leaves, start = [], 0
        for i, (shape, layers) in enumerate(zip(self.shapes, self.rankings_per_leaf, strict=True)):
            stop = start + layers * self._rows_of(i)
            flat = lax.slice_in_dim(arrays[0], start, stop).reshape(layers, -1)
            leaves.append(flat[:, : math.prod(shape) // layers].reshape(shape))
            start = stop
        return leaves

    def _rows_of(self, leaf: int) -> int:
        """Returns the number of rows that one ranking of a leaf takes."""
        size = math.prod(self.shapes[leaf]) // self.rankings_per_leaf[leaf]
        return -(-size // _ENTRIES)


def packing(shapes: Sequence[tuple[int, ...]], leading: Sequence[int]) -> Packing:
    """Chooses how leaves are laid out: packed if no leaf can be sharded, else each by itself.

    Args:
      shapes: Shapes of the leaves.
      leading: For each leaf, how many of its first axes count rankings.

    Returns:
      The packing; it is packed on one device if there is more than one leaf.
    """
    # Shardings that come from `jit(in_shardings=...)` cannot be seen while tracing. So with more
    # than one device any leaf may be sharded.
    is_packed = jax.device_count() == 1 and len(shapes) > 1
    return Packing(tuple(tuple(s) for s in shapes), tuple(map(int, leading)), is_packed)


def iota(shape: tuple[int, ...], leading: int) -> jax.Array:
    """Returns the row-major index within a row, int32, with `leading` axes of length 1 in front."""
    # Left to broadcast over rows: an index for every entry would be one more array in memory.
    row = (1,) * leading + tuple(shape[leading:])
    index = jnp.zeros(row, jnp.int32)
    stride = 1
    for axis in reversed(range(leading, len(shape))):
        index = index + lax.broadcasted_iota(jnp.int32, row, axis) * jnp.int32(stride)
        stride *= shape[axis]
    return index
