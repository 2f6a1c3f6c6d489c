"""Arithmetic on scores, exact: the same integers in every program and on any number of devices."""

import jax
import jax.numpy as jnp
from jax import lax

LOG_BITS = 12  # behind the point, of a logarithm

_FRACTION_BITS = 23
_IMPLICIT = 1 << _FRACTION_BITS
_INFINITY = 255 << _FRACTION_BITS


def add_scores(x: jax.Array, y: jax.Array) -> jax.Array:
    """Adds two magnitudes, given as scores.

    Use it where a score is a sum. A compiler fuses a multiplication and an addition of floats into
    one operation of another rounding in some programs and not in others, so that weights of nearly
    equal scores change places, and masks differ between one device and eight. Here the same sum is
    computed from integers: exact, then rounded toward zero to float32.

    Args:
      x: int32 from `magnitude_scores`; -1 for never.
      y: As `x`, of the same shape.

    Returns:
      int32: `magnitude_scores` of the sum; -1 where one of them is.

    Examples:
      >>> import jax.numpy as jnp, rigl_optax
      >>> x, y = (rigl_optax.magnitude_scores(jnp.array(v)) for v in ([0.5, -3.0], [0.25, 0.5]))
      >>> rigl_optax.add_scores(x, y) == rigl_optax.magnitude_scores(jnp.array([0.75, 3.5]))
      Array([ True,  True], dtype=bool)
    """
    large, small = jnp.maximum(x, y), jnp.minimum(x, y)
    shift = jnp.minimum(_exponent(large) - _exponent(small), 31)
    mantissa = _mantissa(large) + (_mantissa(small) >> shift)
    # Of a mantissa with the implicit bit in place the bits are those of a float one exponent down.
    base = (_exponent(large) - 1) << _FRACTION_BITS
    doubled = (_exponent(large) << _FRACTION_BITS) + (mantissa >> 1)
    total = jnp.where(mantissa >= 2 * _IMPLICIT, doubled, base + mantissa)
    total = jnp.where(large >= _INFINITY, large, total)
    return jnp.where(small < 0, jnp.int32(-1), total)


def log2(x: jax.Array) -> jax.Array:
    """Computes logarithms to base 2 of integers, in units of 1 / 4,096.

    Use it where scores are products, powers or ratios: sums of logarithms are exact. The integer is
    cut to its 16 highest bits; a bit of the result then follows from each of 12 squarings, cut to
    16 bits too. The result is at most 2 units too low.

    Args:
      x: int32, at least 1.

    Returns:
      int32 in [0, 31 * 4,096).

    Examples:
      >>> log2(jnp.array([1, 2, 3, 2**30])).tolist()
      [0, 4096, 6491, 122880]
    """
    exponent = 31 - lax.clz(x)
    left, right = jnp.maximum(15 - exponent, 0), jnp.maximum(exponent - 15, 0)
    mantissa = ((x << left) >> right).astype(jnp.uint32)  # [2**15, 2**16)
    fraction = jnp.zeros_like(x)
    for _ in range(LOG_BITS):
        mantissa = (mantissa * mantissa) >> 15
        bit = mantissa >> 16
        mantissa = mantissa >> bit
        fraction = (fraction << 1) | bit.astype(jnp.int32)
    return (exponent << LOG_BITS) | fraction


def units_of_largest(score: jax.Array, bits: int, axis: int | None = None) -> jax.Array:
    """Rounds magnitudes down to multiples of a power of two, so that sums of them are exact.

    Args:
      score: int32 from `magnitude_scores`.
      bits: How many bits the largest has, at most 24.
      axis: The axis along which it is the largest; None for all.

    Returns:
      int32 below 2**bits.
    """
    behind = _exponent(jnp.max(score, axis, keepdims=True, initial=0)) - _exponent(score)
    return _mantissa(score) >> jnp.minimum(behind + _FRACTION_BITS + 1 - bits, 31)


def log2_of_magnitude(score: jax.Array) -> jax.Array:
    """Computes `log2` of a float's magnitude, times 2**149.

    Args:
      score: int32 from `magnitude_scores`.

    Returns:
      int32 in units of 1 / 4,096, 0 or above; 0 for zero, and for what is not above 2**-149.
    """
    mantissa = jnp.maximum(_mantissa(score), 1)
    return log2(mantissa) + ((_exponent(score) - 1) << LOG_BITS)


def _exponent(score: jax.Array) -> jax.Array:
    """Biased exponent; that of numbers below the normal ones is 1."""
    return jnp.maximum(score >> _FRACTION_BITS, 1)


def _mantissa(score: jax.Array) -> jax.Array:
    fraction = score & (_IMPLICIT - 1)
    return jnp.where(score >= _IMPLICIT, fraction + _IMPLICIT, fraction)
