"""Random topologies, and random values for them: no dense array is made."""

import math
from typing import overload

import jax
import jax.numpy as jnp

from rigl_optax import _distributions
from rigl_optax._ranking import _random
from rigl_optax._structures import Block, Unstructured
from rigl_optax._types import Seed
from rigl_optax.condensed import _kinds
from rigl_optax.condensed._topology import Topology
from rigl_optax.condensed.blocks._topology import BlockTopology
from rigl_optax.condensed.single._csr_topology import CSRTopology


@overload
def random_topology(
    shape: tuple[int, ...],
    sparsity: float,
    block: Block,
    *,
    seed: Seed = ...,
    position: int = ...,
) -> BlockTopology: ...


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
) -> Topology:
    r"""Draws the blocks, or single weights, of a layer; `floor(sparsity * groups)` are absent.

    They are uniformly random, and those that `structure=block` draws in the masked form, with the
    same seed, for the leaf at this position in the tree of parameters.

    Args:
      shape: Shape of the dense kernel, [*window, in, out].
      sparsity: In [0, 1).
      block: Structure of the layer: a `Block`, or `Unstructured()`.
      seed: As in `rigl_optax.rigl`.
      position: Of the leaf, among all leaves of params; each position has a draw of its own.

    Returns:
      A topology.

    Raises:
      ValueError: If the sparsity is outside [0, 1), or the block does not divide the shape; for
        single weights, if the kernel has not two axes, or too many entries.

    Examples:
      >>> import rigl_optax
      >>> from rigl_optax.condensed import random_topology
      >>> random_topology((64, 32), 0.75, rigl_optax.Block(16, 16)).values_shape
      (2, 16, 16)
      >>> random_topology((64, 32), 0.75, rigl_optax.Unstructured()).values_shape
      (512,)
    """
    _distributions.check_sparsity("sparsity", sparsity)
    _random.check_seed(seed)
    kind = _kinds.kind(block, "a layer")
    return kind.random(tuple(shape), sparsity, block, seed, position)


def random_values(
    key: jax.Array,
    topology: Topology,
    dtype: jax.typing.DTypeLike = jnp.float32,
    *,
    sparse_aware: bool = True,
) -> jax.Array:
    r"""Draws normal initial values for stored weights; zeros beyond the edge of a padded layer.

    $$
    \theta \sim N(0, 1 / n), \qquad n = \text{density} \cdot \text{inputs}
    $$

    Args:
      key: For `jax.random`. Do not derive it from the seed of a topology: streams of one key are
        not independent.
      topology: Where the blocks, or single weights, are.
      dtype: Of the values.
      sparse_aware: Whether n counts the inputs that a unit has on average. If not, n counts all
        inputs of the dense kernel, as if that had been drawn and masked.

    Returns:
      Values of shape `topology.values_shape`.

    Examples:
      >>> import jax, rigl_optax
      >>> from rigl_optax.condensed import random_topology, random_values
      >>> topology = random_topology((64, 64), 0.75, rigl_optax.Block(16, 16))
      >>> random_values(jax.random.key(0), topology).shape
      (4, 16, 16)
    """
    inputs: float = math.prod(topology.shape[:-1])
    if sparse_aware:
        # A topology without any group has a density of 0, and no values to scale.
        inputs *= max(topology.density, 1 / math.prod(topology.grid))
    values = jax.random.normal(key, topology.values_shape, dtype)
    return topology.clear_padding(values * jnp.asarray(inputs**-0.5, dtype))
