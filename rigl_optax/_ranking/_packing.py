"""Sparse leaves side by side in one array, so that one kernel serves a whole model.

A kernel for each leaf takes XLA seconds to compile on a network with many layers, and
many launches to run. Leaves that may be sharded stay apart: laying them side by side
would gather them.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# The shape of a row. Large enough for few rows, small enough that the padding of small
# leaves is small; 32 is how far XLA's CPU backend reduces in one pass, and reducing the
# axis before the last it adds whole vectors.
ROW = (32, 128)
_ENTRIES = math.prod(ROW)


class Rows(NamedTuple):
    """Which ranking each row of an array belongs to.

    Rows are the slices along the leading axes, as many as `ids` has; when it is a scalar, the
    array is one row as a whole. A ranking is a layer: a leaf, or a slice of a stacked one; or a
    part of a layer.
    """

    ids: np.ndarray  # int32 [] or [rows] or [layers, rows, ...]: number of the ranking, ascending
    starts: np.ndarray  # int32, same shape: entries of that ranking in the rows before


class Packing(NamedTuple):
    """How the sparse leaves of a tree are laid out for ranking; static under jit."""

    shapes: tuple[tuple[int, ...], ...]
    leading: tuple[int, ...]  # axes in front that count rankings: 0, 1 of a stack, or parts
    is_packed: bool
    in_parts: bool = False  # whether layers have so many rankings that each has to lie apart

    @property
    def layers(self) -> list[int]:
        """Number of rankings in each leaf."""
        return [
            math.prod(shape[:leading])
            for shape, leading in zip(self.shapes, self.leading, strict=True)
        ]

    @property
    def rows(self) -> list[Rows]:
        """For each array that `pack` returns, the ranking of its rows."""
        first = np.cumsum([0, *self.layers]).astype(np.int32)
        if not self.is_packed:
            leaves = zip(self.shapes, self.leading, strict=True)
            fronts = [shape[:leading] for shape, leading in leaves]
            spans = zip(first[:-1], self.layers, fronts, strict=True)
            each = [np.arange(i, i + n, dtype=np.int32).reshape(front) for i, n, front in spans]
            return [Rows(ids, np.zeros_like(ids)) for ids in each]
        per_layer = [self._rows_of(i) for i in range(len(self.shapes))]
        repeats = np.repeat(per_layer, self.layers)
        ids = np.repeat(np.arange(first[-1], dtype=np.int32), repeats)
        starts = np.concatenate([np.arange(n, dtype=np.int32) * _ENTRIES for n in repeats])
        return [Rows(ids, starts)]

    def one_ranking(self) -> list[Rows]:
        """As `rows`, with all layers in one ranking; earlier leaves come first among equals.

        Raises:
          ValueError: If there are more entries than int32 counts.
        """
        sizes = [math.prod(shape) for shape in self.packed_shapes()]
        if sum(sizes) > np.iinfo(np.int32).max:
            raise ValueError(
                f"{sum(sizes)} entries in one ranking; at most {np.iinfo(np.int32).max} (2**31 - 1)"
            )
        first = np.cumsum([0, *sizes[:-1]])
        joined = []
        for start, size, rows in zip(first, sizes, self.rows, strict=True):
            number = max(rows.ids.size, 1)
            starts = start + np.arange(number) * (size // number)
            joined.append(
                Rows(np.zeros_like(rows.ids), starts.astype(np.int32).reshape(rows.ids.shape))
            )
        return joined

    def rankings(self) -> tuple[np.ndarray, np.ndarray]:
        """For each ranking, its leaf and the index of its first entry in it; int32."""
        leaves = np.repeat(np.arange(len(self.shapes), dtype=np.int32), self.layers)
        layer = np.concatenate([np.arange(n, dtype=np.int32) for n in self.layers])
        return leaves, layer * self.sizes()

    def sizes(self) -> np.ndarray:
        """Number of entries of each ranking, int32."""
        each = [math.prod(s) // n for s, n in zip(self.shapes, self.layers, strict=True)]
        return np.repeat(np.asarray(each, np.int32), self.layers)

    def per_row(self, vector: jax.Array) -> jax.Array | list[jax.Array]:
        """A vector with an entry for each ranking, in the form in which it is used for ranking."""
        if not self.in_parts:
            return vector
        pieces = jnp.split(vector, np.cumsum(self.layers)[:-1])
        return [
            piece.reshape(rows.ids.shape) for piece, rows in zip(pieces, self.rows, strict=True)
        ]

    def packed_shapes(self) -> list[tuple[int, ...]]:
        """Shapes of the arrays that `pack` returns."""
        if not self.is_packed:
            return list(self.shapes)
        return [(len(self.rows[0].ids), *ROW)]

    def pack(self, arrays: Sequence[jax.Array], fill: float | bool) -> list[jax.Array]:
        """One array [rows, *ROW] of all entries, padded with `fill`; or `arrays` themselves."""
        if not self.is_packed:
            return list(arrays)
        parts = []
        for i, (array, layers) in enumerate(zip(arrays, self.layers, strict=True)):
            flat = array.reshape(layers, -1)
            padding = self._rows_of(i) * _ENTRIES - flat.shape[1]
            if padding:
                flat = jnp.pad(flat, ((0, 0), (0, padding)), constant_values=fill)
            parts.append(flat.reshape(-1, *ROW))
        return [jnp.concatenate(parts)]

    def unpack(self, arrays: Sequence[jax.Array]) -> list[jax.Array]:
        """The inverse of `pack`."""
        if not self.is_packed:
            return list(arrays)
        leaves, start = [], 0
        for i, (shape, layers) in enumerate(zip(self.shapes, self.layers, strict=True)):
            stop = start + layers * self._rows_of(i)
            flat = lax.slice_in_dim(arrays[0], start, stop).reshape(layers, -1)
            leaves.append(flat[:, : math.prod(shape) // layers].reshape(shape))
            start = stop
        return leaves

    def _rows_of(self, leaf: int) -> int:
        """Rows that one layer of a leaf takes."""
        size = math.prod(self.shapes[leaf]) // self.layers[leaf]
        return -(-size // _ENTRIES)


def packing(shapes: Sequence[tuple[int, ...]], leading: Sequence[int]) -> Packing:
    """How to lay out leaves of these shapes: side by side where nothing can be sharded.

    Args:
      shapes: Of the leaves.
      leading: For each the number of axes in front that count rankings.
    """
    # Shardings that come from `jit(in_shardings=...)` cannot be seen while tracing, so that
    # with more than one device nothing is known to be whole.
    is_packed = jax.device_count() == 1 and len(shapes) > 1
    return Packing(tuple(tuple(s) for s in shapes), tuple(map(int, leading)), is_packed)


def iota(shape: tuple[int, ...], leading: int) -> jax.Array:
    """Row-major index within a row, int32, with `leading` axes of length 1 in front.

    It is left to broadcast: an index for each entry would be one more array in memory.
    """
    row = (1,) * leading + tuple(shape[leading:])
    index = jnp.zeros(row, jnp.int32)
    stride = 1
    for axis in reversed(range(leading, len(shape))):
        index = index + lax.broadcasted_iota(jnp.int32, row, axis) * jnp.int32(stride)
        stride *= shape[axis]
    return index
