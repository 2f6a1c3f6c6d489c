"""Splits a number of connections between layers, in integers that agree on every device."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from rigl_optax._ranking import _top_k
from rigl_optax._ranking._packing import RankingIds
from rigl_optax._xla import _sharding

_BITS = 16  # of a magnitude in a mean
# Of a share: those of up to 2**14 layers add up to less than 2**29, as `_scaled` needs.
_SHARE_BITS = 15


def apportion(total: jax.Array, shares: jax.Array, room: jax.Array) -> jax.Array:
    """Splits `total` between layers in proportion to their shares, as far as there is room.

    Shares are rounded to integers of 15 bits, relative to the largest. Layer l gets
    `floor(total * C_l / C) - floor(total * C_{l-1} / C)`, where C_l are the cumulative shares and
    C is their sum, so the parts add up exactly. If a layer has less room than that, the rest is
    split between the other layers in the same way.

    The split uses integers only. XLA may compile a float division or a sum of floats differently
    in another program or on another mesh, and the masks would differ with it.

    Args:
      total: int32 scalar, non-negative.
      shares: float32 [layers], non-negative; only their ratios matter. If all layers with room
        have share 0, the split is in proportion to their room.
      room: int32 [layers]: the most that each layer can get.

    Returns:
      int32 [layers], adding up to `min(total, sum(room))`.
    """
    # Sums of int32 would be int64 under `jax_enable_x64`.
    wanted = jnp.minimum(total, jnp.sum(room, dtype=jnp.int32))

    def is_open(parts: jax.Array) -> jax.Array:
        return jnp.sum(parts, dtype=jnp.int32) < wanted

    def split(parts: jax.Array) -> jax.Array:
        left, free = wanted - jnp.sum(parts, dtype=jnp.int32), room - parts
        weight = jnp.where(free > 0, shares, 0)
        weight = jnp.where(jnp.max(weight) > 0, weight, free.astype(jnp.float32))
        # A power of two: multiplying by it is exact, so every compiler rounds shares alike.
        scale = _power_of_two(_SHARE_BITS - 1 - _exponent(jnp.max(weight)))
        cumulative = jnp.cumsum((weight * scale).astype(jnp.int32), dtype=jnp.int32)
        bounds = _scaled(left, cumulative)
        return parts + jnp.minimum(jnp.diff(bounds, prepend=0), free)

    return lax.while_loop(is_open, split, jnp.zeros_like(room))


def mean_magnitudes(
    values: Sequence[jax.Array], masks: Sequence[jax.Array], ranking_ids: Sequence[RankingIds]
) -> jax.Array:
    """Returns the mean of `abs(values)` over the active entries of each ranking.

    Each magnitude is rounded to an integer of 16 bits, relative to the largest of its ranking, and
    the integers are summed. A sum of floats depends on its order, which depends on how the arrays
    are sharded, so devices on another mesh would choose other masks.

    Args:
      values: float32 arrays, finite.
      masks: Bool arrays of the same shapes.
      ranking_ids: The rankings that the rows of each array belong to.

    Returns:
      float32 [rankings]; 0 where nothing is active.
    """
    magnitudes = [jnp.where(m, jnp.abs(v), 0) for v, m in zip(values, masks, strict=True)]
    exponents = _exponent(_maxima(magnitudes, ranking_ids))
    scale = _power_of_two(_BITS - 1 - exponents)
    quanta = [
        (m * _top_k.spread(scale, m, r)).astype(jnp.int32)
        for m, r in zip(magnitudes, ranking_ids, strict=True)
    ]

    # An int32 sum of 16-bit integers would overflow, so each bit is counted by itself.
    def add_bit(bit: jax.Array, total: jax.Array) -> jax.Array:
        ones = _top_k.counts([((q >> bit) & 1) == 1 for q in quanta], ranking_ids)
        return total + ones.astype(jnp.float32) * _power_of_two(bit)

    sums = lax.fori_loop(jnp.int32(0), jnp.int32(_BITS), add_bit, jnp.zeros_like(scale))
    active = jnp.maximum(_top_k.counts(masks, ranking_ids), 1).astype(jnp.float32)
    return sums / active * _power_of_two(exponents - (_BITS - 1))


def _scaled(total: jax.Array, parts: jax.Array) -> jax.Array:
    """Returns `floor(total * parts / parts[-1])`, exactly.

    Args:
      total: int32 scalar, non-negative.
      parts: int32 vector, ascending, below 2**29.
    """
    whole = parts[-1]

    # Long division, one bit of `total` at a time: the product does not fit into int32.

    def add_bit(i: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        quotient, rest = carry
        bit = (total >> (30 - i)) & 1
        rest = 2 * rest + bit * parts
        times = (rest >= whole).astype(jnp.int32) + (rest >= 2 * whole).astype(jnp.int32)
        return 2 * quotient + times, rest - times * whole

    zeros = jnp.zeros_like(parts)
    return lax.fori_loop(jnp.int32(0), jnp.int32(31), add_bit, (zeros, zeros))[0]


def _exponent(x: jax.Array) -> jax.Array:
    """Returns the int32 e with 2**e <= x < 2**(e + 1), or -100 if that is larger."""
    # From the bits: a logarithm may be rounded differently elsewhere.
    bits = lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32)
    return jnp.maximum((bits >> 23) - 127, -100)


def _power_of_two(exponent: jax.Array) -> jax.Array:
    """Returns 2**exponent as float32."""
    return lax.bitcast_convert_type((exponent + 127) << 23, jnp.float32)


def _maxima(arrays: Sequence[jax.Array], ranking_ids: Sequence[RankingIds]) -> jax.Array:
    """Returns the largest entry of each ranking."""
    per_row = [
        _sharding.whole(jnp.max(a, axis=tuple(range(r.ids.ndim, a.ndim)))).reshape(-1)
        for a, r in zip(arrays, ranking_ids, strict=True)
    ]
    ids = np.concatenate([r.ids.reshape(-1) for r in ranking_ids])
    number = int(ids[-1]) + 1
    return jax.ops.segment_max(jnp.concatenate(per_row), jnp.asarray(ids), number)
