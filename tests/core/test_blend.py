"""Selections in integers give the bits of a selection, and its derivatives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from rigl_optax._xla import _blend

FLOATS = [jnp.float32, jnp.float16, jnp.bfloat16, jnp.float8_e4m3fn]
OTHERS = [jnp.int32, jnp.uint8, jnp.bool_, jnp.complex64]
SPECIAL = [np.nan, -np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-45, -1e-40, 3e38, 1.0, -2.5, 1e-30]


def values(dtype: jnp.dtype, shift: int) -> jax.Array:
    some = np.roll(np.asarray(SPECIAL * 6, np.float32), shift)
    if jnp.issubdtype(dtype, jnp.floating):
        return jnp.asarray(some).astype(dtype)
    return jnp.asarray(np.nan_to_num(some, posinf=3, neginf=2).clip(0, 9)).astype(dtype)


def mask() -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).random(len(SPECIAL) * 6) < 0.5)


def same_bits(a: jax.Array, b: jax.Array) -> bool:
    return a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.mark.parametrize("dtype", FLOATS + OTHERS, ids=lambda d: jnp.dtype(d).name)
@pytest.mark.parametrize("jitted", [True, False])
def test_bits_are_those_of_a_selection(dtype, jitted):
    x, y, where = values(dtype, 0), values(dtype, 5), mask()
    wrap = jax.jit if jitted else lambda f: f
    assert same_bits(wrap(_blend.select)(where, x, y), lax.select(where, x, y))
    assert same_bits(wrap(_blend.masked)(where, x), lax.select(where, x, jnp.zeros_like(x)))
    for scalar in (True, False):
        whole = jnp.asarray(scalar)
        assert same_bits(wrap(_blend.masked)(whole, x), x if scalar else jnp.zeros_like(x))


@pytest.mark.parametrize("jitted", [True, False])
def test_derivatives_are_those_of_a_selection(jitted):
    # Of bits they would be 0, silently: a loss behind apply_masks would not learn.
    where = jnp.array([True, False, True])
    x, y = jnp.array([1.0, 2.0, 3.0]), jnp.array([4.0, jnp.nan, 6.0])

    def loss(x, y):
        return jnp.sum(_blend.masked(where, x) ** 2 + 3 * _blend.select(where, x, y))

    gradient = jax.grad(loss, (0, 1))
    dx, dy = (jax.jit(gradient) if jitted else gradient)(x, y)
    np.testing.assert_array_equal(dx, [5, 0, 9])
    np.testing.assert_array_equal(dy, [0, 3, 0])
    second = jax.hessian(lambda x: jnp.sum(_blend.masked(where, x) ** 2))(x)
    np.testing.assert_array_equal(second, np.diag([2.0, 0, 2]))


def test_a_batch_is_each_of_its_rows():
    where = jnp.stack([mask(), ~mask()])
    x = jnp.stack([values(jnp.float32, 1), values(jnp.float32, 2)])
    batched = jax.jit(jax.vmap(_blend.masked))(where, x)
    assert same_bits(batched, lax.select(where, x, jnp.zeros_like(x)))
