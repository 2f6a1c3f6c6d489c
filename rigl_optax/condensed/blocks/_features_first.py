"""Products of stored blocks with activations [features, batch].

Only `matmul(..., features_first=True)` takes these, for a chain of linear layers on the CPU, where
one block of features is then one piece of memory. The MLP of `benchmarks/condensed.py` (2048 units,
256 rows, blocks of 32x32) spends two thirds of the time that it does with `_product`, forward and
backward (`--features-last`). Layers, convolutions and recurrences take `_product`: their
activations would have to be transposed, which takes as long as the products.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from rigl_optax.condensed import _devices
from rigl_optax.condensed._dot import accumulator, at_most, dot
from rigl_optax.condensed.blocks._product import Score, is_gathered

# Columns of activations that a loop takes at once: a slice of them, 32 features high, and its
# product stay in the first cache levels.
TILE = 512


def forward(
    values: jax.Array, rows: jax.Array, cols: jax.Array, x: jax.Array, outputs: int
) -> jax.Array:
    """Multiplies activations by stored blocks.

    Args:
      values: [blocks, r, c].
      rows: int32 [blocks]: input block of each.
      cols: int32 [blocks]: output block of each, ascending.
      x: [input blocks, r, batch].
      outputs: Number of output blocks.

    Returns:
      [outputs, c, batch], of at least float32.
    """
    return _by_backend(_forward_loop, _forward_gathered, outputs, values, rows, cols, x)


def backward_input(
    values: jax.Array, rows: jax.Array, cols: jax.Array, dy: jax.Array, inputs: int
) -> jax.Array:
    """Computes the gradient of the inputs from dy, [output blocks, c, batch]."""
    flipped = jnp.swapaxes(values, 1, 2)
    # Blocks are sorted by output, so these sums are not over neighbours.
    return _by_backend(_forward_loop, _forward_gathered_unsorted, inputs, flipped, cols, rows, dy)


def backward_values(
    rows: jax.Array, cols: jax.Array, x: jax.Array, dy: jax.Array, block: tuple[int, int]
) -> jax.Array:
    """Computes the gradient of the stored values alone, [blocks, r, c]."""
    if not rows.size:
        return _devices.zeros((0, *block), accumulator(x, dy), x, dy)
    on_cpu = _values_gathered if _is_small(rows, x, dy) else _values_loop
    return lax.platform_dependent(rows, cols, x, dy, cpu=on_cpu, default=_values_gathered)


def scores(
    x: jax.Array, dy: jax.Array, sizes: jax.Array, score: Score, probe: jax.Array
) -> jax.Array:
    """Scores all blocks of the dense gradient, a column of blocks at a time.

    Args:
      x: [input blocks, r, batch].
      dy: [output blocks, c, batch].
      sizes: [input blocks, output blocks]: number of weights in each block.
      score: `score(gradient [input blocks, r, c], sizes [input blocks]) -> [input blocks]`.
      probe: The zeros whose gradient the scores are.

    Returns:
      [input blocks, output blocks].
    """
    inputs, r, batch = x.shape
    flat = x.reshape(inputs * r, batch)

    def column(each: tuple[jax.Array, jax.Array]) -> jax.Array:
        dy_CxB, sizes_I = each
        product = dot(flat, dy_CxB, (((1,), (1,)), ((), ())))
        product = _devices.summed(product, probe)
        return score(product.reshape(inputs, r, -1), sizes_I)

    return lax.map(column, (dy, sizes.T)).T


def _by_backend(
    loop: Callable[..., jax.Array],
    gathered: Callable[..., jax.Array],
    outputs: int,
    values: jax.Array,
    rows: jax.Array,
    cols: jax.Array,
    x: jax.Array,
) -> jax.Array:
    if not values.shape[0]:
        shape = (outputs, values.shape[2], x.shape[2])
        return _devices.zeros(shape, accumulator(values, x), values, x)
    on_cpu = gathered if _is_small(rows, x) else loop
    return lax.platform_dependent(
        values,
        rows,
        cols,
        x,
        cpu=functools.partial(on_cpu, outputs),
        default=functools.partial(gathered, outputs),
    )


def _is_small(rows: jax.Array, *activations: jax.Array) -> bool:
    """Whether the CPU gathers, for each block, its activations [..., features, batch]."""
    each = sum(x.shape[1] * x.shape[2] * x.dtype.itemsize for x in activations)
    return is_gathered(rows.shape[0] * each)


def _forward_loop(
    outputs: int, values: jax.Array, rows: jax.Array, cols: jax.Array, x: jax.Array
) -> jax.Array:
    dtype, batch = accumulator(values, x), x.shape[2]

    def product(x_IxRxB: jax.Array) -> jax.Array:
        def add(k: jax.Array, y: jax.Array) -> jax.Array:
            part = dot(values[k], x_IxRxB[rows[k]], (((0,), (0,)), ((), ())))
            return y.at[cols[k]].add(part, mode="promise_in_bounds")

        shape = (outputs, values.shape[2], x_IxRxB.shape[2])
        y = _devices.zeros(shape, dtype, values, x_IxRxB)
        return lax.fori_loop(0, values.shape[0], add, y)

    if at_most(batch, 2 * TILE, otherwise=True):
        return product(x)
    y_TxOxCxB = lax.map(product, _tiles(x))
    return jnp.moveaxis(y_TxOxCxB, 0, 2).reshape(*y_TxOxCxB.shape[1:3], -1)[..., :batch]


def _tiles(x: jax.Array) -> jax.Array:
    """Cuts [blocks, features, batch] into [tiles, blocks, features, TILE], padded with zeros."""
    missing = -x.shape[2] % TILE
    padded = jnp.pad(x, ((0, 0), (0, 0), (0, missing))) if missing else x
    return jnp.moveaxis(padded.reshape(*x.shape[:2], -1, TILE), 2, 0)


def _values_loop(rows: jax.Array, cols: jax.Array, x: jax.Array, dy: jax.Array) -> jax.Array:
    dtype = accumulator(x, dy)

    def products(x_IxRxB: jax.Array, dy_OxCxB: jax.Array) -> jax.Array:
        def one(index: tuple[jax.Array, jax.Array]) -> jax.Array:
            row, col = index
            return dot(x_IxRxB[row], dy_OxCxB[col], (((1,), (1,)), ((), ())))

        return lax.map(one, (rows, cols))

    if at_most(x.shape[2], 2 * TILE, otherwise=True):
        return products(x, dy)

    def add(total: jax.Array, tile: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        return total + products(*tile), None

    total = _devices.zeros((rows.shape[0], x.shape[1], dy.shape[1]), dtype, x, dy)
    return lax.scan(add, total, (_tiles(x), _tiles(dy)))[0]


def _gathered(
    outputs: int,
    values: jax.Array,
    rows: jax.Array,
    cols: jax.Array,
    x: jax.Array,
    are_sorted: bool,
) -> jax.Array:
    # [blocks, c, batch]: one batched product.
    parts = dot(values, x[rows], (((1,), (1,)), ((0,), (0,))))
    return jax.ops.segment_sum(parts, cols, outputs, indices_are_sorted=are_sorted)


def _forward_gathered(
    outputs: int, values: jax.Array, rows: jax.Array, cols: jax.Array, x: jax.Array
) -> jax.Array:
    return _gathered(outputs, values, rows, cols, x, are_sorted=True)


def _forward_gathered_unsorted(
    outputs: int, values: jax.Array, rows: jax.Array, cols: jax.Array, x: jax.Array
) -> jax.Array:
    return _gathered(outputs, values, rows, cols, x, are_sorted=False)


def _values_gathered(rows: jax.Array, cols: jax.Array, x: jax.Array, dy: jax.Array) -> jax.Array:
    return dot(x[rows], dy[cols], (((2,), (2,)), ((0,), (0,))))
