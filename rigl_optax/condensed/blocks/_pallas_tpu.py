"""Products of stored blocks as Pallas kernels for TPUs: their grids follow the list of blocks.

The list is prefetched to scalar memory, where the index maps of a kernel read which block of
weights, and of activations, the next step needs; so these are copied while the last step computes.
Nothing is gathered in HBM, sums stay in VMEM, in float32, and are written once.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from rigl_optax.condensed import _devices
from rigl_optax.condensed._dot import accumulator
from rigl_optax.condensed.blocks._product import padded

# Rows of activations that a step takes at most, and what VMEM may hold of all their features, in
# two buffers: the default limit of a kernel is 16 MB on the smallest TPUs.
TILE = 512
PANEL = 8 * 2**20
SUBLANES = 16  # rows of a tile of 16-bit numbers; those of 32 bits have 8
LANES = 128  # columns of a tile


def forward(
    values: jax.Array,
    rows: jax.Array,
    cols: jax.Array,
    x: jax.Array,
    features: int,
    *,
    interpret: bool,
) -> jax.Array:
    """Multiplies activations by stored blocks: as `_product.forward`, rounded to dtype of `x`."""
    _check(interpret, values, x)
    order = jnp.arange(values.shape[0], dtype=jnp.int32)
    y = _multiply(1, values, order, rows, cols, x, features, interpret)
    return y.astype(accumulator(values, x))  # as the other products; rounding again undoes it


def backward(
    values: jax.Array,
    rows: jax.Array,
    cols: jax.Array,
    x: jax.Array,
    dy: jax.Array,
    *,
    interpret: bool,
) -> tuple[jax.Array, jax.Array]:
    """Computes the gradients of the inputs and of the stored values: as `_product.backward`."""
    _check(interpret, values, x, dy)
    order = jnp.argsort(rows, stable=True).astype(jnp.int32)
    dx = _multiply(2, values, order, cols[order], rows[order], dy, x.shape[1], interpret)
    block = values.shape[1], values.shape[2]
    return dx.astype(accumulator(values, dy)), _values(rows, cols, x, dy, block, interpret)


def _check(interpret: bool, *arrays: jax.Array) -> None:
    if interpret and _devices.differs(*arrays):
        raise ValueError(
            "product 'pallas' on 'cpu': JAX interprets no kernels in a shard_map, nor, therefore, "
            "under explicit axes; choose another for 'cpu' in condensed.products"
        )
    if accumulator(*arrays) != jnp.float32:
        raise ValueError(f"product 'pallas' adds up in float32; got {accumulator(*arrays)}")
    if not all(isinstance(n, int) for x in arrays for n in x.shape):
        raise ValueError("product 'pallas': the size of the batch must be known; it is symbolic")


def _multiply(
    axis: int,
    values: jax.Array,
    order: jax.Array,
    sources: jax.Array,
    targets: jax.Array,
    x: jax.Array,
    features: int,
    interpret: bool,
) -> jax.Array:
    """Multiplies the columns `sources` of x by blocks; adds up the products at `targets`.

    A step takes some rows of x, all their features, and one block. Blocks of one target follow
    each other, so that its sum stays where it is; a target without blocks is never visited.

    Args:
      axis: The axis of the blocks that is contracted: 1 for the product, 2 for its transpose.
      values: [blocks, r, c].
      order: int32 [blocks]: index of the block that comes first, and so on.
      sources: int32 [blocks]: the columns of x that each block multiplies, in this order.
      targets: int32 [blocks]: the columns of the result that it adds to, ascending.
      x: [batch, features].
      features: Number of columns of the result.
      interpret: Whether the kernel is interpreted, where there is no TPU.
    """
    batch, n, size, other = x.shape[0], values.shape[0], values.shape[axis], values.shape[3 - axis]
    groups = -(-features // other)
    if not n or not batch:
        return _devices.zeros((batch, features), x.dtype, values, x)
    inputs = -(-x.shape[1] // size)
    tile = rows_at_once(batch, inputs * size * x.dtype.itemsize)
    x = _rows_padded(padded(x, inputs * size), tile)
    x_layout, y_layout = _Layout(inputs, size), _Layout(groups, other)
    dtype = accumulator(values, x)

    def kernel(order: Any, sources: Any, targets: Any, x: Any, w: Any, y: Any, total: Any) -> None:
        del order  # for the index maps alone
        b = pl.program_id(1)
        target = targets[b]

        @pl.when((b == 0) | (target != targets[jnp.maximum(b - 1, 0)]))
        def _() -> None:
            total[...] = jnp.zeros_like(total)

        contracted = (((1,), (axis - 1,)), ((), ()))
        part = x_layout.read(x, sources[b])
        total[...] += lax.dot_general(part, w[...], contracted, preferred_element_type=dtype)

        @pl.when((b == n - 1) | (target != targets[jnp.minimum(b + 1, n - 1)]))
        def _() -> None:
            y[...] = total[...].astype(y.dtype)

    y = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(x.shape[0] // tile, n),
            in_specs=[
                x_layout.all_blocks(tile),
                pl.BlockSpec((None, *values.shape[1:]), lambda m, b, order, *_: (order[b], 0, 0)),
            ],
            out_specs=y_layout.one_block(tile, lambda m, b, order, s, targets: (m, targets[b])),
            scratch_shapes=[pltpu.VMEM((tile, other), dtype)],
        ),
        out_shape=_devices.shaped(y_layout.shape(x.shape[0]), x.dtype, values, x),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=interpret,
    )(order, sources, targets, x_layout.of(x), values)
    flat = y_layout.flat(y)[:batch, :features]
    # What was never visited was never written.
    is_visited = jnp.zeros(groups, bool).at[targets].set(True)
    return jnp.where(jnp.repeat(is_visited, other)[:features], flat, jnp.zeros((), flat.dtype))


def _values(
    rows: jax.Array,
    cols: jax.Array,
    x: jax.Array,
    dy: jax.Array,
    block: tuple[int, int],
    interpret: bool,
) -> jax.Array:
    """Computes the gradient of the stored values alone, [blocks, r, c], of at least float32.

    A step takes some rows of one block of x. Those of `dy` stay for all blocks of an output, whole
    if they fit.
    """
    (r, c), n, dtype = block, rows.shape[0], accumulator(x, dy)
    if not n or not x.shape[0]:
        return _devices.zeros((n, r, c), dtype, x, dy)
    tile = rows_at_once(x.shape[0], r * x.dtype.itemsize)
    x_layout, dy_layout = _Layout(-(-x.shape[1] // r), r), _Layout(-(-dy.shape[1] // c), c)
    x = _rows_padded(padded(x, x_layout.blocks * r), tile)
    dy = _rows_padded(padded(dy, dy_layout.blocks * c), tile)
    batch = x.shape[0]
    is_whole = 2 * batch * max(c, LANES) * dy.dtype.itemsize <= PANEL

    def kernel(rows: Any, cols: Any, x: Any, dy: Any, out: Any, total: Any) -> None:
        del rows, cols  # for the index maps alone
        m = pl.program_id(1)

        @pl.when(m == 0)
        def _() -> None:
            total[...] = jnp.zeros_like(total)

        part = dy[pl.ds(pl.multiple_of(m * tile, tile), tile), :] if is_whole else dy[...]
        contracted = (((0,), (0,)), ((), ()))
        total[...] += lax.dot_general(x[...], part, contracted, preferred_element_type=dtype)

        @pl.when(m == batch // tile - 1)
        def _() -> None:
            out[...] = total[...]

    def dy_place(b: Any, m: Any, rows: Any, cols: Any) -> tuple[Any, Any]:
        return (0 if is_whole else m), cols[b]

    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(n, batch // tile),
            in_specs=[
                x_layout.one_block(tile, lambda b, m, rows, cols: (m, rows[b])),
                dy_layout.one_block(batch if is_whole else tile, dy_place),
            ],
            out_specs=pl.BlockSpec((None, r, c), lambda b, m, *_: (b, 0, 0)),
            scratch_shapes=[pltpu.VMEM((r, c), dtype)],
        ),
        out_shape=_devices.shaped((n, r, c), dtype, x, dy),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=interpret,
    )(rows, cols, x_layout.of(x), dy_layout.of(dy))


class _Layout(NamedTuple):
    """How a kernel sees activations [batch, blocks * size].

    As they are, if a block is whole tiles wide. Narrower ones are put apart, [blocks, batch, size],
    by a copy.
    """

    blocks: int
    size: int

    @property
    def is_flat(self) -> bool:
        return self.size % LANES == 0

    def shape(self, batch: int) -> tuple[int, ...]:
        return (batch, self.blocks * self.size) if self.is_flat else (self.blocks, batch, self.size)

    def of(self, x: jax.Array) -> jax.Array:
        """Brings activations into this layout."""
        if self.is_flat:
            return x
        return x.reshape(x.shape[0], self.blocks, self.size).swapaxes(0, 1)

    def flat(self, y: jax.Array) -> jax.Array:
        """Inverts `of`."""
        return y if self.is_flat else y.swapaxes(0, 1).reshape(y.shape[1], self.blocks * self.size)

    def one_block(self, rows: int, place: Callable[..., tuple[Any, Any]]) -> pl.BlockSpec:
        """Shows a kernel [rows, size]; `place(...)` is the index of the rows, and the block."""
        if self.is_flat:
            return pl.BlockSpec((rows, self.size), place)

        def index(*at: Any) -> tuple[Any, Any, int]:
            row, block = place(*at)
            return block, row, 0

        return pl.BlockSpec((None, rows, self.size), index)

    def all_blocks(self, rows: int) -> pl.BlockSpec:
        """Shows a kernel all features of some rows, those that the first axis of its grid says."""
        if self.is_flat:
            return pl.BlockSpec((rows, self.blocks * self.size), lambda m, *_: (m, 0))
        return pl.BlockSpec((self.blocks, rows, self.size), lambda m, *_: (0, m, 0))

    def read(self, x: Any, block: Any) -> jax.Array:
        """Reads a block, [rows, size], of what `all_blocks` shows."""
        if self.is_flat:
            return x[:, pl.ds(pl.multiple_of(block * self.size, self.size), self.size)]
        return x[block]


def rows_at_once(batch: int, row: int) -> int:
    """Returns how many rows a step takes: of `row` bytes each, in two buffers."""
    tile = TILE
    while tile > SUBLANES and (2 * tile * row > PANEL or tile // 2 >= batch):
        tile //= 2
    return tile


def _rows_padded(x: jax.Array, tile: int) -> jax.Array:
    missing = -x.shape[0] % tile
    return jnp.pad(x, ((0, missing), (0, 0))) if missing else x
