"""What training asks of a topology; `BlockTopology` and `CSRTopology` are the two kinds.

A group is a block of the one kind, a single weight of the other.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, Self

import jax
import jax.numpy as jnp

from rigl_optax._layout import SparseLeaf
from rigl_optax._types import PyTree, Seed
from rigl_optax.condensed._kernel import Kernel


class RandomGrowth(NamedTuple):
    """Where random growth draws its scores from: the numbers that the masked form draws.

    Attributes:
      seed: The method's.
      position: Of the leaf, among all leaves of params.
      count: int32 scalar, of the rewiring.
    """

    seed: Seed
    position: int
    count: jax.Array  # type: ignore[assignment]


class Move(NamedTuple):
    """A rewiring of one layer: its new topology, and where each stored group comes from.

    Attributes:
      topology: The new one.
      source: int32 [number]: index of each group in the old order; any index for newborn groups.
      is_kept: bool [number]: False for newborn groups. A scalar stands for all of them.
    """

    topology: "Topology"
    source: jax.Array
    is_kept: jax.Array

    def apply(self, old: jax.Array, newborn: jax.Array) -> jax.Array:
        """Puts stored values in the new order: `old` ones of kept groups, `newborn` elsewhere."""
        is_kept = self.is_kept.reshape(-1, *(1,) * (old.ndim - 1))
        return jnp.where(is_kept, old[self.source], newborn)


class Ranking(NamedTuple):
    """The groups of a layer that a rewiring chooses from, in arrays of one shape.

    Attributes:
      weights: float32, of any sign: pooled weights, 0 where nothing is stored.
      gradients: float32, of any sign: pooled gradients; if growth is random, 0 where nothing is
        stored.
      mask: bool: which groups are stored.
      indices: int32: row-major index of each group in the grid of the layer.
      is_valid: bool scalar: False if the gradients are not those of this layer's loss, as where a
        kernel of single weights is used twice. The topology stays then.
      move: `move(mask) -> Move`, for a new mask of these groups with as many True.
    """

    weights: jax.Array
    gradients: jax.Array
    mask: jax.Array
    indices: jax.Array
    is_valid: jax.Array
    move: Callable[[jax.Array], Move]


class Topology(Protocol):
    """Where the stored groups of a layer are: indices, as a pytree with static shapes."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the dense kernel, [*window, in, out]."""

    @property
    def grid(self) -> tuple[int, ...]:
        """Shape of the groups of the dense kernel."""

    @property
    def number(self) -> int:
        """Number of stored groups."""

    @property
    def density(self) -> float:
        """Fraction of the groups that are stored."""

    @property
    def values_shape(self) -> tuple[int, ...]:
        """Shape of the stored values, [number, ...]."""

    @classmethod
    def from_mask(cls, mask: Any, structure: Any, path: str) -> Self:
        """Makes, on the host, the topology of a mask of weights.

        Raises:
          ValueError: If the mask is not made of whole groups, or its shape does not suit.
        """

    @classmethod
    def random(
        cls, shape: tuple[int, ...], sparsity: float, structure: Any, seed: Seed, position: int
    ) -> Self:
        """Draws `floor(sparsity * groups)` absent groups, as `random_topology` says."""

    def grid_mask(self) -> jax.Array:
        """Returns which groups are stored: bool, of shape `grid`."""

    def dense_mask(self) -> jax.Array:
        """Returns which weights are stored: bool, of the shape of the dense kernel."""

    def extract(self, dense: jax.Array) -> jax.Array:
        """Returns the stored entries of a dense array, in `values_shape`."""

    def clear_padding(self, values: jax.Array) -> jax.Array:
        """Sets values to 0 where a group reaches beyond the edge of the layer."""

    def bind(self, values: jax.Array, probe: Any = None) -> Kernel:
        """Makes the kernel of these values: what models multiply by."""

    def probe(self) -> PyTree:
        """Returns zeros whose gradients are the scores that growth needs."""

    def as_leaf(self, path: str, position: int) -> SparseLeaf:
        """Describes the layer as the masked form does, with what `rank` ranks as its grid."""

    def check_rewirable(self, path: str, min_fan_in: int) -> None:
        """Raises a ValueError if the layer cannot be rewired."""

    def limited(self, fraction: float) -> Self:
        """Prepares for rewirings that replace at most this fraction of the groups."""

    def with_sample(self, ratio: float, seed: Seed, position: int) -> Self:
        """Prepares for growth among a random sample of positions.

        Args:
          ratio: How many are sampled, for each stored group.
          seed: Of the sample.
          position: Of the leaf, among all leaves of params.

        Raises:
          ValueError: If int32 cannot number them.
        """

    def at_count(self, count: jax.Array) -> Self:
        """Prepares for gradients of the step with this count."""

    def rank(
        self,
        values: jax.Array,
        gradients: jax.Array,
        scores: Any,
        growth: RandomGrowth | None,
    ) -> Ranking:
        """Collects what a rewiring chooses from.

        Args:
          values: The stored ones.
          gradients: Of these values; in the ranking if growth is random.
          scores: The gradient of the probe; zeros if growth is random.
          growth: What random growth is drawn from; None if scores decide.
        """
