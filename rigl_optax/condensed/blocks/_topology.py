"""Where the stored blocks of a layer are: int32 indices with static shapes."""

import dataclasses
import functools
import math
from typing import Any, overload

import jax
import jax.numpy as jnp
import numpy as np

from rigl_optax import _distributions
from rigl_optax._ranking import _packing, _random, _top_k
from rigl_optax._structures import Block, Unstructured
from rigl_optax._types import Seed
from rigl_optax.condensed.single import _candidates, _csr_topology
from rigl_optax.condensed.single._csr_topology import CSRTopology


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["rows", "cols"], meta_fields=["shape", "block"]
)
@dataclasses.dataclass(frozen=True)
class Topology:
    """The blocks that a condensed layer has, in a flat list sorted by output block.

    Attributes:
      rows: int32 [blocks]: input block of each.
      cols: int32 [blocks]: output block of each, ascending.
      shape: Of the dense kernel that it stands for, [*window, in, out].
      block: The structure: its size, and how blocks are scored.
    """

    rows: jax.Array
    cols: jax.Array
    shape: tuple[int, ...]
    block: Block

    @property
    def blocks(self) -> int:
        """Number of stored blocks."""
        return self.rows.shape[0]

    @property
    def grid(self) -> tuple[int, int]:
        """Input blocks and output blocks of the dense kernel."""
        inputs, outputs = self.block.grid(self.shape, "a layer")
        return inputs, outputs

    @property
    def values_shape(self) -> tuple[int, ...]:
        """Shape of the stored values: [blocks, *window, rows, cols]."""
        return (self.blocks, *self.shape[:-2], self.block.rows, self.block.cols)

    @property
    def density(self) -> float:
        """Stored blocks of all."""
        return self.blocks / math.prod(self.grid)

    def mask(self) -> jax.Array:
        """Bool, of the shape of the grid: True where there is a block."""
        return jnp.zeros(self.grid, bool).at[self.rows, self.cols].set(True)

    def transposed(self) -> tuple["Topology", jax.Array]:
        """The topology of the transposed kernel, and where each of its blocks is in this one."""
        if math.prod(self.shape[:-2]) != 1:
            raise ValueError(f"a kernel of shape {self.shape} is a convolution's: no transpose")
        order = jnp.argsort(self.rows, stable=True)
        block = dataclasses.replace(self.block, rows=self.block.cols, cols=self.block.rows)
        shape = (self.shape[-1], self.shape[-2])
        return Topology(self.cols[order], self.rows[order], shape, block), order

    def sizes(self) -> jax.Array:
        """int32 [blocks]: how many weights of each block lie within the layer."""
        sizes = jnp.asarray(self.block.group_sizes(self.shape), jnp.int32)
        return sizes[self.rows, self.cols]


def from_mask(mask: jax.Array, blocks: int, shape: tuple[int, ...], block: Block) -> Topology:
    """The topology of a mask of blocks, of which `blocks` (static) must be True."""
    # By output block first, so that sums over the inputs of an output are over neighbours.
    (flat,) = jnp.nonzero(mask.T.reshape(-1), size=blocks, fill_value=0)
    cols, rows = jnp.divmod(flat.astype(jnp.int32), mask.shape[0])
    return Topology(rows, cols, shape, block)


@overload
def random_topology(
    shape: tuple[int, ...],
    sparsity: float,
    block: Block,
    *,
    seed: Seed = ...,
    position: int = ...,
) -> Topology: ...


@overload
def random_topology(
    shape: tuple[int, ...],
    sparsity: float,
    block: Unstructured,
    *,
    seed: Seed = ...,
    position: int = ...,
) -> CSRTopology: ...


def random_topology(
    shape: tuple[int, ...],
    sparsity: float,
    block: Block | Unstructured,
    *,
    seed: Seed = 0,
    position: int = 0,
) -> Topology | CSRTopology:
    r"""Uniformly random blocks, or single weights; `floor(sparsity * groups)` are absent.

    The same ones as `structure=block` draws in the masked form for the leaf at this position
    in the tree of parameters, with the same seed. Nothing of the size of the kernel is made.

    Args:
      shape: Of the dense kernel, [*window, in, out].
      sparsity: In [0, 1).
      block: Its structure: a `Block`, or `Unstructured()`.
      seed: As in `rigl`.
      position: Of the leaf, among all leaves of params; another draw for each.

    Returns:
      A topology.

    Raises:
      ValueError: If the sparsity is outside [0, 1), or the block does not divide the shape; if
        single weights are to be of a kernel that has not two axes, or too many places.

    Example:
      >>> import rigl_optax
      >>> from rigl_optax.condensed import random_topology
      >>> random_topology((64, 32), 0.75, rigl_optax.Block(16, 16)).values_shape
      (2, 16, 16)
      >>> random_topology((64, 32), 0.75, rigl_optax.Unstructured()).values_shape
      (512,)
    """
    _distributions.check_sparsity("sparsity", sparsity)
    _random.check_seed(seed)
    if isinstance(block, Unstructured):
        _csr_topology.check_shape(tuple(shape), "a layer")
        number = math.prod(shape) - _distributions.zeros_in(sparsity, math.prod(shape))
        word = jnp.asarray(seed, jnp.uint32)
        return _random_weights(tuple(shape), number, position, word)
    grid = block.grid(shape, "a layer")
    number = math.prod(grid) - _distributions.zeros_in(sparsity, math.prod(grid))
    packing = _packing.packing([grid], [False])
    scores = _random.random_scores(seed, _random.Purpose.INITIAL_MASK, [position], packing)
    chosen = _top_k.top_k(scores, packing.ranking_ids, jnp.asarray([number], jnp.int32))
    return from_mask(packing.unpack(chosen)[0], number, tuple(shape), block)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _random_weights(
    shape: tuple[int, ...], number: int, position: int, seed: jax.Array
) -> CSRTopology:
    purpose = _random.Purpose.INITIAL_MASK
    found = _candidates.at_random(seed, purpose, position, 0, shape, number)
    replaceable = _csr_topology.all_replaceable(number, shape)
    return _csr_topology.from_places(found.places, shape, replaceable)


def random_values(
    key: jax.Array,
    topology: Topology | CSRTopology,
    dtype: jax.typing.DTypeLike = jnp.float32,
    *,
    sparse_aware: bool = True,
) -> jax.Array:
    r"""Initial values of what is stored, normal; zero beyond the edge of a padded layer.

    .. math:: \theta \sim N(0, 1 / n), \qquad n = \text{density} \cdot \text{inputs}

    Args:
      key: For `jax.random`; never the one that topologies are seeded by.
      topology: Where the blocks are, or the single weights.
      dtype: Of the values.
      sparse_aware: Whether n counts the inputs that are there on the average; else all inputs of
        the dense kernel, as if it had been drawn and masked.

    Returns:
      Values of shape `topology.values_shape`. Nothing larger is made.

    Example:
      >>> import jax, rigl_optax
      >>> from rigl_optax.condensed import random_topology, random_values
      >>> topology = random_topology((64, 64), 0.75, rigl_optax.Block(16, 16))
      >>> random_values(jax.random.key(0), topology).shape
      (4, 16, 16)
    """
    inputs: float = math.prod(topology.shape[:-1])
    if sparse_aware:
        inputs *= max(topology.density, 1 / math.prod(topology.grid))
    values = jax.random.normal(key, topology.values_shape, dtype)
    if isinstance(topology, CSRTopology):
        return values * jnp.asarray(inputs**-0.5, dtype)
    inside = _inside(topology.rows, topology.block.rows, topology.shape[-2])[:, :, None]
    inside = inside & _inside(topology.cols, topology.block.cols, topology.shape[-1])[:, None]
    shape = (topology.blocks, *(1,) * (len(topology.shape) - 2), *inside.shape[1:])
    return jnp.where(inside.reshape(shape), values * jnp.asarray(inputs**-0.5, dtype), 0)


def _inside(blocks: jax.Array, size: int, bound: int) -> jax.Array:
    """[blocks, size]: whether each row, or column, of a block lies within the layer."""
    return blocks[:, None] * size + jnp.arange(size) < bound


def check_grid(mask: Any, shape: tuple[int, ...], block: Block, path: str) -> np.ndarray:
    """The mask of blocks of a mask of weights, on the host.

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


@jax.jit
def extract(dense: jax.Array, topology: Topology) -> jax.Array:
    """The stored blocks of a dense array, [blocks, *window, rows, cols]."""
    (inputs, outputs), block, window = topology.grid, topology.block, topology.shape[:-2]
    missing = (
        inputs * block.rows - topology.shape[-2],
        outputs * block.cols - topology.shape[-1],
    )
    dense = jnp.pad(dense, [(0, 0)] * len(window) + [(0, missing[0]), (0, missing[1])])
    tiles = dense.reshape(*window, inputs, block.rows, outputs, block.cols)
    n = len(window)
    return tiles.transpose(n, n + 2, *range(n), n + 1, n + 3)[topology.rows, topology.cols]
