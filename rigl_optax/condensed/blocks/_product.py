"""Products of stored blocks with activations [batch, features]: what `x @ kernel` does.

On the CPU a loop over the blocks, each a small product of a few columns of the activations;
elsewhere, and where little is gathered, one batched product and a segment sum.
`_features_first` has the same functions for transposed activations.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from rigl_optax.condensed import _devices
from rigl_optax.condensed._dot import accumulator, at_most, dot

# Rows of activations that a gradient of kernels takes at once, so that their columns stay in the
# cache. More than twice as many are taken in turn.
ROWS = 2048
# Bytes of activations that the CPU gathers for one batched product, instead of a loop over the
# blocks: a copy that stays in the cache is cheaper than many small products. A step of a recurrent
# network is below it (`benchmarks/condensed_layers.py`: GRU and LSTM), a batch of an MLP above.
GATHERED = 2 * 2**20
# Bytes of the dense gradient that are scored at a time, a quarter of it at most; one row if that
# is more. Products that give a row of blocks of 32x32 alone took twice as long.
SCORED = 2**21

# `score(gradient, sizes) -> scores` of a row or column of blocks.
Score = Callable[[jax.Array, jax.Array], jax.Array]


def forward(
    values: jax.Array, rows: jax.Array, cols: jax.Array, x: jax.Array, features: int
) -> jax.Array:
    """Multiplies activations by stored blocks.

    Args:
      values: [blocks, r, c].
      rows: int32 [blocks]: input block of each.
      cols: int32 [blocks]: output block of each, ascending.
      x: [batch, inputs].
      features: Number of outputs; the last block may reach beyond them.

    Returns:
      [batch, features], of at least float32.
    """
    return _multiply(1, features, values, rows, cols, x)


def backward_input(
    values: jax.Array, rows: jax.Array, cols: jax.Array, dy: jax.Array, features: int
) -> jax.Array:
    """Computes the gradient of the inputs, [batch, features], from that of the outputs."""
    return _multiply(2, features, values, cols, rows, dy)


def backward_values(
    rows: jax.Array, cols: jax.Array, x: jax.Array, dy: jax.Array, block: tuple[int, int]
) -> jax.Array:
    """Computes the gradient of the stored values alone, [blocks, r, c], of at least float32."""
    if not rows.size:
        return _devices.zeros((0, *block), accumulator(x, dy), x, dy)
    is_small = is_gathered(rows.shape[0] * x.shape[0] * sum(block) * x.dtype.itemsize)
    return lax.platform_dependent(
        rows,
        cols,
        x,
        dy,
        cpu=functools.partial(_values_gathered if is_small else _values_loop, block),
        default=functools.partial(_values_gathered, block),
    )


def backward(
    values: jax.Array,
    rows: jax.Array,
    cols: jax.Array,
    x: jax.Array,
    dy: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Computes both gradients, of the inputs and of the stored values, in one loop over the blocks.

    The columns of `dy` that a block needs for either are then cut out once.

    Args:
      values: [blocks, r, c].
      rows: int32 [blocks]: input block of each.
      cols: int32 [blocks]: output block of each, ascending.
      x: [batch, inputs].
      dy: [batch, outputs].

    Returns:
      [batch, inputs], and [blocks, r, c], of at least float32.
    """
    features, block = x.shape[1], (values.shape[1], values.shape[2])

    def apart(*arrays: jax.Array) -> tuple[jax.Array, jax.Array]:
        values, rows, cols, x, dy = arrays
        dx = backward_input(values, rows, cols, dy, features)
        return dx, backward_values(rows, cols, x, dy, block)

    size = values.shape[0] * x.shape[0] * x.dtype.itemsize
    if not values.shape[0] or is_gathered(size * values.shape[2]):
        return apart(values, rows, cols, x, dy)
    return lax.platform_dependent(values, rows, cols, x, dy, cpu=_backward_loop, default=apart)


def scores(
    x: jax.Array,
    dy: jax.Array,
    sizes: jax.Array,
    block: tuple[int, int],
    score: Score,
    probe: jax.Array,
) -> jax.Array:
    """Scores all blocks of the dense gradient, some rows of blocks at a time.

    Only these rows of the gradient exist at any time: the whole one would be as large as the dense
    kernel.

    Args:
      x: [batch, inputs].
      dy: [batch, outputs].
      sizes: [input blocks, output blocks]: number of weights in each block.
      block: r and c.
      score: `score(gradient [r, output blocks, c], sizes [output blocks]) -> [output blocks]`.
      probe: The zeros whose gradient the scores are.

    Returns:
      [input blocks, output blocks].
    """
    (inputs, outputs), (r, c) = sizes.shape, block
    x, dy = padded(x, inputs * r), padded(dy, outputs * c)
    size = r * outputs * c * accumulator(x, dy).itemsize
    most = min(SCORED // size, inputs // 4)
    n = max(n for n in range(1, max(1, most) + 1) if inputs % n == 0)

    def rows(each: tuple[jax.Array, jax.Array]) -> jax.Array:
        index, sizes_NxO = each
        product = _devices.summed(_gradient(_columns(x, index, n * r), dy), probe)
        return jax.vmap(score)(product.reshape(n, r, outputs, c), sizes_NxO)

    each = jnp.arange(inputs // n), sizes.reshape(-1, n, outputs)
    return lax.map(rows, each).reshape(inputs, outputs)


def is_gathered(size: int) -> bool:
    """Whether the CPU gathers activations of `size` bytes; never if the size is symbolic."""
    return at_most(size, GATHERED, otherwise=False)


def _multiply(
    axis: int,
    features: int,
    values: jax.Array,
    sources: jax.Array,
    targets: jax.Array,
    x: jax.Array,
) -> jax.Array:
    """Multiplies the columns `sources` of x by blocks; adds up the products at `targets`.

    Args:
      axis: The axis of the blocks that is contracted: 1 for the product, 2 for its transpose.
      features: Number of columns of the result.
      values: [blocks, r, c].
      sources: int32 [blocks]: the columns of x that each block multiplies.
      targets: int32 [blocks]: the columns of the result that it adds to.
      x: [batch, features].
    """
    if not values.shape[0]:
        return _devices.zeros((x.shape[0], features), accumulator(values, x), values, x)
    is_small = is_gathered(values.shape[0] * x.shape[0] * values.shape[axis] * x.dtype.itemsize)
    y = lax.platform_dependent(
        values,
        sources,
        targets,
        x,
        cpu=functools.partial(_gathered if is_small else _loop, axis, features),
        default=functools.partial(_gathered, axis, features),
    )
    return y[:, :features]


def _loop(
    axis: int,
    features: int,
    values: jax.Array,
    sources: jax.Array,
    targets: jax.Array,
    x: jax.Array,
) -> jax.Array:
    size, other = values.shape[axis], values.shape[3 - axis]
    x, dtype = padded(x, -(-x.shape[1] // size) * size), accumulator(values, x)
    contracted = (((1,), (axis - 1,)), ((), ()))

    # Slices of columns, in place: transposing what many rows give, to have features first, takes
    # as long as the products.
    def add(k: jax.Array, y: jax.Array) -> jax.Array:
        part = dot(_columns(x, sources[k], size), values[k], contracted)
        total = _columns(y, targets[k], other) + part
        return lax.dynamic_update_slice_in_dim(y, total, targets[k] * other, 1)

    y = _devices.zeros((x.shape[0], -(-features // other) * other), dtype, values, x)
    return lax.fori_loop(0, values.shape[0], add, y)


def _gathered(
    axis: int,
    features: int,
    values: jax.Array,
    sources: jax.Array,
    targets: jax.Array,
    x: jax.Array,
) -> jax.Array:
    # [blocks, batch, size]: one batched product.
    parts = dot(_blocked(x, values.shape[axis])[sources], values, (((2,), (axis,)), ((0,), (0,))))
    outputs = -(-features // parts.shape[2])
    # Blocks are stored in the order of their outputs, so only the forward product adds up
    # neighbours.
    y = jax.ops.segment_sum(parts, targets, outputs, indices_are_sorted=axis == 1)
    return y.swapaxes(0, 1).reshape(x.shape[0], outputs * parts.shape[2])


def _values_loop(
    block: tuple[int, int], rows: jax.Array, cols: jax.Array, x: jax.Array, dy: jax.Array
) -> jax.Array:
    (r, c), sizes = block, (x.shape[1], dy.shape[1])
    x, dy = (padded(a, -(-n // s) * s) for a, n, s in zip((x, dy), sizes, block, strict=True))

    def one(place: tuple[jax.Array, jax.Array]) -> jax.Array:
        row, col = place
        return _gradient(_columns(x, row, r), _columns(dy, col, c))

    return lax.map(one, (rows, cols))


def _backward_loop(
    values: jax.Array, rows: jax.Array, cols: jax.Array, x: jax.Array, dy: jax.Array
) -> tuple[jax.Array, jax.Array]:
    (_, r, c), features, dtype = values.shape, x.shape[1], accumulator(x, values, dy)
    x, dy = padded(x, -(-features // r) * r), padded(dy, -(-dy.shape[1] // c) * c)

    def add(dx: jax.Array, block: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        values_RxC, row, col = block
        dy_BxC = _columns(dy, col, c)
        part = dot(dy_BxC, values_RxC, (((1,), (1,)), ((), ())))
        total = _columns(dx, row, r) + part
        dx = lax.dynamic_update_slice_in_dim(dx, total, row * r, 1)
        return dx, _gradient(_columns(x, row, r), dy_BxC)

    dx = _devices.zeros(x.shape, dtype, values, x, dy)
    dx, dvalues = lax.scan(add, dx, (values, rows, cols))
    return dx[:, :features], dvalues


def _values_gathered(
    block: tuple[int, int], rows: jax.Array, cols: jax.Array, x: jax.Array, dy: jax.Array
) -> jax.Array:
    contracted = (((1,), (1,)), ((0,), (0,)))
    return dot(_blocked(x, block[0])[rows], _blocked(dy, block[1])[cols], contracted)


def _gradient(x: jax.Array, dy: jax.Array) -> jax.Array:
    """Computes `x.T @ dy`, `ROWS` rows at a time."""
    batch = x.shape[0]

    def product(x: jax.Array, dy: jax.Array) -> jax.Array:
        return dot(x, dy, (((0,), (0,)), ((), ())))

    if at_most(batch, 2 * ROWS, otherwise=True):
        return product(x, dy)

    def add(total: jax.Array, first: jax.Array) -> tuple[jax.Array, None]:
        parts = (lax.dynamic_slice_in_dim(a, first, ROWS) for a in (x, dy))
        return total + product(*parts), None

    whole = batch // ROWS * ROWS
    total = product(x[whole:], dy[whole:])
    return lax.scan(add, total, jnp.arange(0, whole, ROWS))[0]


def _columns(x: jax.Array, block: jax.Array, size: int) -> jax.Array:
    """Returns the columns of one block of features, [batch, size]."""
    return lax.dynamic_slice_in_dim(x, block * size, size, 1)


def _blocked(x: jax.Array, size: int) -> jax.Array:
    """Turns [batch, features] into [blocks, batch, size], with zeros beyond the edge."""
    blocks = -(-x.shape[1] // size)
    return padded(x, blocks * size).reshape(x.shape[0], blocks, size).swapaxes(0, 1)


def padded(x: jax.Array, features: int) -> jax.Array:
    """Adds columns of zeros, up to `features` columns."""
    missing = features - x.shape[1]
    return jnp.pad(x, ((0, 0), (0, missing))) if missing else x
