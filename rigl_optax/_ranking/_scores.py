"""Arithmetic on scores, exact: the same integers in every program and on any number of devices."""

import jax
import jax.numpy as jnp

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


def _exponent(score: jax.Array) -> jax.Array:
    """Biased exponent; that of numbers below the normal ones is 1."""
    return jnp.maximum(score >> _FRACTION_BITS, 1)


def _mantissa(score: jax.Array) -> jax.Array:
    fraction = score & (_IMPLICIT - 1)
    return jnp.where(score >= _IMPLICIT, fraction + _IMPLICIT, fraction)
