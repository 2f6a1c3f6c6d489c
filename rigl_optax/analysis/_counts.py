"""Counts the weights of one layer behind each measure of how its topology moves.

An entry of a mask may stand for several weights, those of a block: `weights` says for how many.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Counts(NamedTuple):
    """A fraction as two int32 scalars, in weights.

    Attributes:
      part: The weights that fulfil the condition.
      whole: The weights among which they are counted.
    """

    part: jax.Array
    whole: jax.Array


def count(mask: jax.Array, weights: jax.typing.ArrayLike = 1) -> jax.Array:
    """Sums `weights` over the entries that are True: int32 scalar."""
    return jnp.sum(jnp.where(mask, weights, 0), dtype=jnp.int32)


def churn(before: jax.Array, after: jax.Array, weights: jax.typing.ArrayLike = 1) -> Counts:
    """Counts the weights active before that are not active after."""
    return Counts(count(before & ~after, weights), count(before, weights))


def overlap(masks: jax.Array, initial: jax.Array, weights: jax.typing.ArrayLike = 1) -> Counts:
    """Counts the weights active in `initial` that are active in `masks`."""
    return Counts(count(initial & masks, weights), count(initial, weights))


def coverage(explored: jax.Array, weights: jax.typing.ArrayLike = 1) -> Counts:
    """Counts the weights that have ever been active, among all."""
    return Counts(count(explored, weights), count(jnp.ones_like(explored), weights))
