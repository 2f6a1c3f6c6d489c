"""Computes activations again in the backward pass, for parts of a batch in turn or for all of it.

`jax.checkpoint` alone does not save memory on the CPU: XLA finds that both computations are the
same, and keeps the first. It does not look for that in loops, so everything here is one.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

Function = Callable[[jax.Array], jax.Array]


def by_parts(function: Function, x: jax.Array, parts: int) -> jax.Array:
    """Applies a function to parts of a batch in turn, and keeps only its input for gradients.

    The activations of one part exist at a time. On the CPU they stay nearer to the cache, which may
    save more time than the second computation takes.

    Args:
      function: Of a batch, example by example; its result has the shape of its argument.
      x: (batch, ...).
      parts: In how many parts; of a batch that they do not divide, their greatest common divisor.

    Returns:
      `function(x)`.
    """
    batch = x.shape[0]
    if not isinstance(batch, int) or (parts := math.gcd(parts, batch)) == 1:
        return function(x)  # an exported program's batch has no size yet, and no gradient
    # Each part takes examples from all over the batch: where a batch is spread over devices, they
    # stay where they are.
    cut = x.reshape(batch // parts, parts, *x.shape[1:]).swapaxes(0, 1)
    y = lax.map(jax.checkpoint(function, prevent_cse=False), cut)
    return y.swapaxes(0, 1).reshape(x.shape)


def recomputed(function: Function, x: jax.Array) -> jax.Array:
    """Applies a function to a whole batch, and keeps only its input for gradients.

    Use it where a gradient is no sum over parts of a batch, as the scores of growth are not.

    Args:
      function: Its result has the shape of its argument.
      x: (batch, ...).

    Returns:
      `function(x)`.
    """

    def step(x: jax.Array, is_first: jax.Array) -> tuple[jax.Array, None]:
        return lax.cond(is_first, function, lambda x: x, x), None

    # Of two rounds, since XLA takes a loop of one apart; the second one does nothing.
    rounds = jnp.array([True, False])
    return lax.scan(jax.checkpoint(step, prevent_cse=False), x, rounds)[0]
