"""How connections are shared out between layers: exact integers, the same on every device."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from rigl_optax._ranking import _top_k
from rigl_optax._ranking._packing import Rows
from rigl_optax._xla import _sharding

_BITS = 16
_SHARE_BITS = 15


def apportion(total: jax.Array, shares: jax.Array, room: jax.Array) -> jax.Array:
    """Splits `total` between layers in proportion to their shares, as far as there is room.

    Shares are taken as integers, to 15 bits of the largest, and rounded cumulatively, so that
    the parts add up: layer l gets `floor(total * C_l / C) - floor(total * C_{l-1} / C)`
    with the cumulative shares C_l and their sum C. What is more than a layer has room for is
    split again between the others.

    Only integers: what a compiler makes of a float division or of a sum of floats depends on
    what is around it, and so would the masks.

    Args:
      total: int32 scalar, non-negative.
      shares: float32 [layers], non-negative; only their ratios matter. If those of all
        layers with room are 0, their room takes its place.
      room: int32 [layers]: the most a layer can get.

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
        scale = _power_of_two(_SHARE_BITS - 1 - _exponent(jnp.max(weight)))
        cumulative = jnp.cumsum((weight * scale).astype(jnp.int32), dtype=jnp.int32)
        bounds = _scaled(left, cumulative)
        return parts + jnp.minimum(jnp.diff(bounds, prepend=0), free)

    return lax.while_loop(is_open, split, jnp.zeros_like(room))


def mean_magnitudes(
    values: Sequence[jax.Array], masks: Sequence[jax.Array], rows: Sequence[Rows]
) -> jax.Array:
    """Mean of `abs(values)` over the active entries of each layer, to 16 bits of its largest.

    Floats added up in another order give another sum, so that devices with other shards
    would disagree; here only integers are added.

    Args:
      values: float32 arrays, finite.
      masks: Bool arrays of the same shapes.
      rows: Which rankings the rows of the arrays belong to.

    Returns:
      float32 [rankings]; 0 where nothing is active.
    """
    magnitudes = [jnp.where(m, jnp.abs(v), 0) for v, m in zip(values, masks, strict=True)]
    exponents = _exponent(_maxima(magnitudes, rows))
    scale = _power_of_two(_BITS - 1 - exponents)
    quanta = [
        (m * _top_k.spread(scale, m, r)).astype(jnp.int32)
        for m, r in zip(magnitudes, rows, strict=True)
    ]

    def add_bit(bit: jax.Array, total: jax.Array) -> jax.Array:
        ones = _top_k.counts([((q >> bit) & 1) == 1 for q in quanta], rows)
        return total + ones.astype(jnp.float32) * _power_of_two(bit)

    sums = lax.fori_loop(jnp.int32(0), jnp.int32(_BITS), add_bit, jnp.zeros_like(scale))
    active = jnp.maximum(_top_k.counts(masks, rows), 1).astype(jnp.float32)
    return sums / active * _power_of_two(exponents - (_BITS - 1))


def _scaled(total: jax.Array, parts: jax.Array) -> jax.Array:
    """`floor(total * parts / parts[-1])` for ascending int32 parts below 2**29, exactly.

    Bit by bit, since the product does not fit.
    """
    whole = parts[-1]

    def add_bit(i: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        quotient, rest = carry
        bit = (total >> (30 - i)) & 1
        rest = 2 * rest + bit * parts
        times = (rest >= whole).astype(jnp.int32) + (rest >= 2 * whole).astype(jnp.int32)
        return 2 * quotient + times, rest - times * whole

    zeros = jnp.zeros_like(parts)
    return lax.fori_loop(jnp.int32(0), jnp.int32(31), add_bit, (zeros, zeros))[0]


def _exponent(x: jax.Array) -> jax.Array:
    """The e with 2**e <= x < 2**(e + 1), int32; at least -100."""
    bits = lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32)
    return jnp.maximum((bits >> 23) - 127, -100)


def _power_of_two(exponent: jax.Array) -> jax.Array:
    """2**exponent, float32: to multiply by it is exact."""
    return lax.bitcast_convert_type((exponent + 127) << 23, jnp.float32)


def _maxima(arrays: Sequence[jax.Array], rows: Sequence[Rows]) -> jax.Array:
    """Largest entry of each ranking."""
    per_row = [
        _sharding.whole(jnp.max(a, axis=tuple(range(r.ids.ndim, a.ndim)))).reshape(-1)
        for a, r in zip(arrays, rows, strict=True)
    ]
    ids = np.concatenate([r.ids.reshape(-1) for r in rows])
    number = int(ids[-1]) + 1
    return jax.ops.segment_max(jnp.concatenate(per_row), jnp.asarray(ids), number)
