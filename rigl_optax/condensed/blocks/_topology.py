"""Where the stored blocks of a layer are, and how a rewiring moves them."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rigl_optax import _distributions
from rigl_optax._layout import SparseLeaf
from rigl_optax._ranking import _packing, _random, _top_k
from rigl_optax._structures import Block
from rigl_optax._types import Seed
from rigl_optax.condensed._topology import Move, RandomGrowth, Ranking
from rigl_optax.condensed.blocks._kernel import BlockSparse


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["rows", "cols"], meta_fields=["shape", "block"]
)
@dataclasses.dataclass(frozen=True)
class BlockTopology:
    """The blocks that a condensed layer stores, in a flat list sorted by output block.

    Attributes:
      rows: int32 [blocks]: input block of each.
      cols: int32 [blocks]: output block of each, ascending.
      shape: Shape of the dense kernel, [*window, in, out].
      block: Structure of the layer: the size of blocks, and how they are scored.
    """

    rows: jax.Array
    cols: jax.Array
    shape: tuple[int, ...]
    block: Block

    @classmethod
    def from_mask(cls, mask: Any, structure: Block, path: str) -> "BlockTopology":
        """Makes the topology of a mask of weights, on the host.

        Raises:
          ValueError: If a block is active in part.
        """
        shape = tuple(np.shape(mask))
        grid = _whole_blocks(mask, shape, structure, path)
        cols, rows = (jnp.asarray(i, jnp.int32) for i in np.nonzero(grid.T))
        return cls(rows, cols, shape, structure)

    @classmethod
    def random(
        cls, shape: tuple[int, ...], sparsity: float, structure: Block, seed: Seed, position: int
    ) -> "BlockTopology":
        """Draws `floor(sparsity * blocks)` absent blocks."""
        grid = structure.grid(shape, "a layer")
        number = math.prod(grid) - _distributions.zeros_in(sparsity, math.prod(grid))
        packing = _packing.packing([grid], [False])
        scores = _random.random_scores(seed, _random.Purpose.INITIAL_MASK, [position], packing)
        chosen = _top_k.top_k(scores, packing.ranking_ids, jnp.asarray([number], jnp.int32))
        return _from_grid_mask(packing.unpack(chosen)[0], number, shape, structure)

    @property
    def number(self) -> int:
        """Number of stored blocks."""
        return self.rows.shape[0]

    @property
    def grid(self) -> tuple[int, int]:
        """Numbers of input blocks and output blocks of the dense kernel."""
        inputs, outputs = self.block.grid(self.shape, "a layer")
        return inputs, outputs

    @property
    def values_shape(self) -> tuple[int, ...]:
        """Shape of the stored values: [blocks, *window, rows, cols]."""
        return (self.number, *self.shape[:-2], self.block.rows, self.block.cols)

    @property
    def density(self) -> float:
        """Fraction of the blocks that are stored."""
        return self.number / math.prod(self.grid)

    def grid_mask(self) -> jax.Array:
        """Returns which blocks are stored: bool, of shape `grid`."""
        return jnp.zeros(self.grid, bool).at[self.rows, self.cols].set(True)

    def dense_mask(self) -> jax.Array:
        """Returns which weights are stored: bool, of the shape of the dense kernel."""
        return self.block.expand(self.grid_mask(), self.shape)

    def transposed(self) -> tuple["BlockTopology", jax.Array]:
        """Returns the topology of the transposed kernel, and each of its blocks' index in this."""
        if math.prod(self.shape[:-2]) != 1:
            raise ValueError(f"a kernel of shape {self.shape} is a convolution's: no transpose")
        order = jnp.argsort(self.rows, stable=True)
        block = dataclasses.replace(self.block, rows=self.block.cols, cols=self.block.rows)
        shape = (self.shape[-1], self.shape[-2])
        return BlockTopology(self.cols[order], self.rows[order], shape, block), order

    @jax.jit
    def extract(self, dense: jax.Array) -> jax.Array:
        """Returns the stored blocks of a dense array, [blocks, *window, rows, cols]."""
        (inputs, outputs), block, window = self.grid, self.block, self.shape[:-2]
        missing = inputs * block.rows - self.shape[-2], outputs * block.cols - self.shape[-1]
        dense = jnp.pad(dense, [(0, 0)] * len(window) + [(0, missing[0]), (0, missing[1])])
        tiles = dense.reshape(*window, inputs, block.rows, outputs, block.cols)
        n = len(window)
        return tiles.transpose(n, n + 2, *range(n), n + 1, n + 3)[self.rows, self.cols]

    def clear_padding(self, values: jax.Array) -> jax.Array:
        """Sets values to 0 where a block reaches beyond the edge of the layer."""
        inside = _inside(self.rows, self.block.rows, self.shape[-2])[:, :, None]
        inside = inside & _inside(self.cols, self.block.cols, self.shape[-1])[:, None]
        shape = (self.number, *(1,) * (len(self.shape) - 2), *inside.shape[1:])
        return jnp.where(inside.reshape(shape), values, 0)

    def bind(self, values: jax.Array, probe: jax.Array | None = None) -> BlockSparse:
        """Makes the kernel of these values."""
        return BlockSparse(values, self, probe)

    def probe(self) -> jax.Array:
        """Returns zeros whose gradients are the scores of all blocks: see `BlockSparse`."""
        return jnp.zeros(self.grid, jnp.float32)

    def as_leaf(self, path: str, position: int) -> SparseLeaf:
        """Describes the layer as the masked form does: all blocks are ranked."""
        absent = math.prod(self.grid) - self.number
        return SparseLeaf(path, position, False, absent, self.block, self.shape, self.grid)

    def check_rewirable(self, path: str, min_fan_in: int) -> None:
        """Accepts every layer; whether `min_fan_in` suits it is checked as in the masked form."""

    def limited(self, fraction: float) -> "BlockTopology":
        """Returns the topology as it is: all blocks are ranked whatever the fraction."""
        del fraction
        return self

    def with_sample(self, ratio: float, seed: Seed, position: int) -> "BlockTopology":
        """Returns the topology as it is: all blocks have scores, and the rule samples them."""
        del ratio, seed, position
        return self

    def at_count(self, count: jax.Array) -> "BlockTopology":
        """Returns the topology as it is."""
        del count
        return self

    def rank(
        self,
        values: jax.Array,
        gradients: jax.Array,
        scores: jax.Array,
        growth: RandomGrowth | None,
    ) -> Ranking:
        """Collects all blocks of the layer. Random growth draws scores of its own for the grid."""
        sizes = jnp.asarray(self.block.group_sizes(self.shape), jnp.int32)[self.rows, self.cols]

        def on_grid(stored: jax.Array) -> jax.Array:
            each = self.block.score(stored, tuple(range(1, stored.ndim)), sizes)
            return jnp.zeros(self.grid, jnp.float32).at[self.rows, self.cols].set(each)

        def move(mask: jax.Array) -> Move:
            new = _from_grid_mask(mask, self.number, self.shape, self.block)
            old_index = jnp.full(self.grid, -1, jnp.int32)
            order = jnp.arange(self.number, dtype=jnp.int32)
            old_index = old_index.at[self.rows, self.cols].set(order)
            source = old_index[new.rows, new.cols]
            return Move(new, jnp.maximum(source, 0), source >= 0)

        return Ranking(
            weights=on_grid(values),
            gradients=scores.astype(jnp.float32) if growth is None else on_grid(gradients),
            mask=self.grid_mask(),
            indices=jnp.arange(math.prod(self.grid), dtype=jnp.int32).reshape(self.grid),
            # Scores of several uses of a kernel add up to a bound of the score of the sum.
            is_valid=jnp.ones((), bool),
            move=move,
        )


def as_blocks(kernel: jax.Array | BlockSparse) -> BlockSparse:
    """Turns a dense kernel into a single block of its own size; returns a `BlockSparse` as it is.

    Examples:
      >>> import jax.numpy as jnp
      >>> as_blocks(jnp.ones((8, 6))).values.shape
      (1, 8, 6)
    """
    if isinstance(kernel, BlockSparse):
        return kernel
    first = jnp.zeros(1, jnp.int32)
    *_, inputs, outputs = kernel.shape
    return BlockTopology(first, first, tuple(kernel.shape), Block(inputs, outputs)).bind(
        kernel[None]
    )


def _from_grid_mask(
    mask: jax.Array, number: int, shape: tuple[int, ...], block: Block
) -> BlockTopology:
    """Makes the topology of a mask of blocks, `number` (static) of them True; under `jit`."""
    # By output block first, so that the products of an output are added up as neighbours.
    (flat,) = jnp.nonzero(mask.T.reshape(-1), size=number, fill_value=0)
    cols, rows = jnp.divmod(flat.astype(jnp.int32), mask.shape[0])
    return BlockTopology(rows, cols, shape, block)


def _inside(blocks: jax.Array, size: int, bound: int) -> jax.Array:
    """Returns whether each row, or column, of a block lies within the layer, [blocks, size]."""
    return blocks[:, None] * size + jnp.arange(size) < bound


def _whole_blocks(mask: Any, shape: tuple[int, ...], block: Block, path: str) -> np.ndarray:
    """Returns the mask of blocks of a mask of weights.

    Raises:
      ValueError: If a block is active in part.
    """
    whole = np.asarray(mask)
    groups = np.asarray(block.groups(jnp.asarray(whole)))
    if not np.array_equal(whole, np.asarray(block.expand(jnp.asarray(groups), shape))):
        if whole.ndim > 2 and not any(block.misfit(x) for x in whole):
            raise ValueError(
                f"{path!r} of shape {shape}: each of the {len(whole)} slices along its first axis "
                "has blocks of its own, as layers that are stacked have; a kernel has the same in "
                "all of its window: give each layer a leaf of its own"
            )
        raise ValueError(
            f"{path!r}: blocks are active in part; condense what was trained with structure={block}"
        )
    return groups
