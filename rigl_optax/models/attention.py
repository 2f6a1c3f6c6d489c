"""Attention, causal or not; on the CPU, scores that causality masks are mostly not computed.

Suffixes of names are shapes: B batch, H heads, Q queries, S keys, K width of a head, T time.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

# Queries that the CPU takes at once, with all keys up to the last of them.
QUERIES = 64


def attend(
    q_BxTxHxK: jax.Array, k_BxTxHxK: jax.Array, v_BxTxHxK: jax.Array, *, is_causal: bool
) -> jax.Array:
    """Computes `jax.nn.dot_product_attention`.

    On the CPU that computes all scores of a causal attention and masks half of them. Here some
    queries at a time see the keys up to the last of them: the result is the same up to rounding.

    Args:
      q_BxTxHxK: Queries.
      k_BxTxHxK: Keys.
      v_BxTxHxK: Values.
      is_causal: Whether a position sees only those before it, and itself.

    Returns:
      An array of the same shape and dtype.
    """
    plain = functools.partial(jax.nn.dot_product_attention, is_causal=is_causal)
    if not is_causal or q_BxTxHxK.shape[1] <= QUERIES:
        return plain(q_BxTxHxK, k_BxTxHxK, v_BxTxHxK)
    return lax.platform_dependent(
        q_BxTxHxK, k_BxTxHxK, v_BxTxHxK, cpu=_causal_by_queries, default=plain
    )


def _causal_by_queries(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    q_BxHxTxK, k_BxHxTxK, v_BxHxTxK = (x.swapaxes(1, 2) for x in (q, k, v))
    time, scale = q.shape[1], q.shape[3] ** -0.5
    parts = []
    for first in range(0, time, QUERIES):
        last = min(first + QUERIES, time)
        scores_BxHxQxS = jnp.einsum(
            "bhqk,bhsk->bhqs",
            q_BxHxTxK[:, :, first:last],
            k_BxHxTxK[:, :, :last],
            preferred_element_type=jnp.float32,
        )
        is_seen_QxS = jnp.arange(first, last)[:, None] >= jnp.arange(last)
        lowest = jnp.finfo(jnp.float32).min
        weights_BxHxQxS = jax.nn.softmax(jnp.where(is_seen_QxS, scores_BxHxQxS * scale, lowest))
        values_BxHxSxK = v_BxHxTxK[:, :, :last]
        parts.append(jnp.einsum("bhqs,bhsk->bhqk", weights_BxHxQxS.astype(v.dtype), values_BxHxSxK))
    return jnp.concatenate(parts, axis=2).swapaxes(1, 2)
