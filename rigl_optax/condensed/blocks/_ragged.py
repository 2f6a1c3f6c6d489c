"""Products of stored blocks as grouped products, by `jax.lax.ragged_dot_general`.

A group is a block of outputs. Its stored blocks lie one after the other, so the product contracts
the gathered inputs of each group with a stack of its blocks: groups of an axis that is contracted,
of sizes that only the topology knows. The gradient of the inputs is the same with blocks in the
order of their inputs, and that of the values has the groups as rows. Grouped-matmul kernels do
that on some platforms; elsewhere XLA multiplies a masked copy for each group.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from rigl_optax.condensed import _devices
from rigl_optax.condensed._dot import accumulator
from rigl_optax.condensed.blocks._product import padded

# Which axes of the two factors are contracted, grouped, and count the groups.
_CONTRACTED = lax.RaggedDotDimensionNumbers((((1,), (0,)), ((), ())), (1,), ())
_ROWS = lax.RaggedDotDimensionNumbers((((0,), (1,)), ((), ())), (1,), (0,))


def forward(
    values: jax.Array, rows: jax.Array, cols: jax.Array, x: jax.Array, features: int
) -> jax.Array:
    """Multiplies activations by stored blocks: as `_product.forward`."""
    n, r, c = values.shape
    if not n:
        return _devices.zeros((x.shape[0], features), accumulator(values, x), values, x)
    return _by_group(_gathered(x, rows, r), values.reshape(n * r, c), cols, r, features)


def backward(
    values: jax.Array, rows: jax.Array, cols: jax.Array, x: jax.Array, dy: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Computes the gradients of the inputs and of the stored values: as `_product.backward`."""
    (n, r, c), dtype = values.shape, accumulator(values, x, dy)
    if not n:
        return _devices.zeros(x.shape, dtype, values, x, dy), _devices.zeros(
            (0, r, c), dtype, x, dy
        )
    order = jnp.argsort(rows, stable=True)
    flipped = values[order].swapaxes(1, 2).reshape(n * c, r)
    dx = _by_group(_gathered(dy, cols[order], c), flipped, rows[order], c, x.shape[1])

    groups = -(-dy.shape[1] // c)
    blocked = padded(dy, groups * c).reshape(-1, groups, c).swapaxes(0, 1)
    sizes = _sizes(cols, groups, r)
    dvalues = _ragged_dot(_gathered(x, rows, r), blocked, sizes, _ROWS)
    return dx, dvalues.reshape(n, r, c)


def _by_group(
    x: jax.Array, stacked: jax.Array, targets: jax.Array, size: int, features: int
) -> jax.Array:
    """Contracts the columns of x with rows of `stacked`, for each target apart.

    Args:
      x: [batch, blocks * size], gathered.
      stacked: [blocks * size, other].
      targets: int32 [blocks]: the group of each block, ascending.
      size: Columns of x of a block.
      features: Number of columns of the result.

    Returns:
      [batch, features], of at least float32.
    """
    other = stacked.shape[1]
    groups = -(-features // other)
    y = _ragged_dot(x, stacked, _sizes(targets, groups, size), _CONTRACTED)
    return y.swapaxes(0, 1).reshape(x.shape[0], groups * other)[:, :features]


def _ragged_dot(
    a: jax.Array, b: jax.Array, sizes: jax.Array, dimensions: lax.RaggedDotDimensionNumbers
) -> jax.Array:
    """Computes `lax.ragged_dot_general`, added up in at least float32."""
    dtype = accumulator(a, b)
    a, b = _devices.differing(a, b), _devices.differing(b, a)
    sizes = _devices.differing(sizes, a)

    def product(a: jax.Array, b: jax.Array, sizes: jax.Array) -> jax.Array:
        return lax.ragged_dot_general(a, b, sizes, dimensions, preferred_element_type=dtype)

    if a.dtype == b.dtype == dtype:
        return product(a, b, sizes)
    # As in `_dot.dot`: XLA's CPU backend refuses 16-bit operands in some layouts.
    widened = functools.partial(_widened, product, dtype)
    return lax.platform_dependent(a, b, sizes, cpu=widened, default=product)


def _widened(product: Any, dtype: Any, a: jax.Array, b: jax.Array, sizes: jax.Array) -> jax.Array:
    return product(a.astype(dtype), b.astype(dtype), sizes)


def _gathered(x: jax.Array, blocks: jax.Array, size: int) -> jax.Array:
    """Gathers blocks of columns side by side, [batch, blocks * size]."""
    number = -(-x.shape[1] // size)
    each = padded(x, number * size).reshape(-1, number, size)[:, blocks]
    return each.reshape(x.shape[0], blocks.shape[0] * size)


def _sizes(groups: jax.Array, number: int, size: int) -> jax.Array:
    """Returns how many rows each group has, int32 [number]."""
    return jnp.zeros(number, jnp.int32).at[groups].add(size)
