"""Products of arrays of any two dtypes, added up in at least float32."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

Axes = tuple[int, ...]
Dimensions = tuple[tuple[Axes, Axes], tuple[Axes, Axes]]  # contracted, and of the batch


def dot(a: jax.Array, b: jax.Array, dimensions: Dimensions) -> jax.Array:
    """Computes `lax.dot_general`, added up in at least float32."""
    dtype = accumulator(a, b)
    product = functools.partial(
        lax.dot_general, dimension_numbers=dimensions, preferred_element_type=dtype
    )
    if a.dtype == b.dtype == dtype:
        return product(a, b)

    def widened(a: jax.Array, b: jax.Array) -> jax.Array:
        return product(a.astype(dtype), b.astype(dtype))

    # XLA's CPU backend refuses 16-bit operands in some of the layouts that it may choose itself.
    # Widening them first changes no product.
    return lax.platform_dependent(a, b, cpu=widened, default=product)


def accumulator(*arrays: jax.Array) -> jnp.dtype:
    """Returns the dtype in which products of these arrays are added up: at least float32."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(*arrays, jnp.float32)


def common_dtype(*arrays: jax.Array) -> jnp.dtype:
    """Returns the dtype that arrays are promoted to, even where JAX is set to refuse promotion."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(*arrays)


def at_most(size: int, bound: int, *, otherwise: bool) -> bool:
    """Compares a size with a bound; returns `otherwise` for a symbolic size, as in `jax.export`."""
    return size <= bound if isinstance(size, int) else otherwise
