"""Convolutions with stored blocks of channels; a block has all taps of the window.

On the CPU a loop over the blocks, each a convolution of some channels of the images as they are:
products with shifted tiles of transposed pixels took two to three times as long
(`benchmarks/condensed_layers.py` times what is here). Elsewhere one grouped convolution of gathered
channels, and a segment sum.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from rigl_optax.condensed import _devices
from rigl_optax.condensed._dot import accumulator, common_dtype, dot
from rigl_optax.condensed.blocks._kernel import BlockSparse, Spec, matmul

Padding = str | Sequence[tuple[int, int]]
_LAYOUT = ("NHWC", "HWIO", "NHWC")
# Bytes of the rows of images that a gradient of kernels takes at a time, so that every tap finds
# them in the cache.
ROWS = 1 << 19


def convolve(
    x: jax.Array, kernel: BlockSparse, *, strides: Sequence[int] = (1, 1), padding: Padding = "SAME"
) -> jax.Array:
    """Convolves images with a condensed kernel.

    Args:
      x: [batch, height, width, in channels].
      kernel: Of shape [height, width, in, out].
      strides: Of the window, along height and width.
      padding: `SAME`, `VALID`, or pairs (before, after) of zeros along height and width.

    Returns:
      [batch, height, width, out channels].

    Raises:
      ValueError: If shapes do not fit.
    """
    shape = kernel.topology.shape
    if len(shape) != 4 or x.ndim != 4 or x.shape[-1] != shape[2]:
        raise ValueError(f"images of shape {x.shape} do not fit a kernel of shape {shape}")
    if len(strides) != 2:
        raise ValueError(f"strides={tuple(strides)}: must be two, of height and width")
    pads = (
        lax.padtype_to_pads(x.shape[1:3], shape[:2], strides, padding)
        if isinstance(padding, str)
        else padding
    )
    pads = tuple((int(low), int(high)) for low, high in pads)
    if shape[:2] == (1, 1) and pads == ((0, 0), (0, 0)):
        # A product of pixels; XLA's own 1x1 convolution takes twice as long on the CPU.
        return matmul(x[:, :: strides[0], :: strides[1]], kernel)
    return _windowed(tuple(strides), pads, x, kernel)


def _windowed(
    strides: tuple[int, ...],
    padding: tuple[tuple[int, int], ...],
    x: jax.Array,
    kernel: BlockSparse,
) -> jax.Array:
    topology = kernel.topology
    window = _Window(Spec(topology.block, topology.shape), strides, padding)

    def product(x: jax.Array, kernel: BlockSparse) -> jax.Array:
        dtype, topology = common_dtype(x, kernel.values), kernel.topology
        values, x = kernel.values.astype(dtype), x.astype(dtype)
        return _convolve(window, values, topology.rows, topology.cols, x, kernel.probe)

    cut = _devices.examples(x, 1, 2, 3)
    if cut is not None:
        product = _devices.by_parts(product, (cut, PartitionSpec()), cut)
    return product(x, kernel)


class _Window(NamedTuple):
    """The static part of a convolution."""

    spec: Spec
    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]

    def apply(self, x: jax.Array, values: jax.Array, groups: int = 1) -> jax.Array:
        """Convolves with a dense kernel [height, width, in / groups, out]."""
        return lax.conv_general_dilated(
            x,
            values,
            self.strides,
            self.padding,
            dimension_numbers=_LAYOUT,
            feature_group_count=groups,
            preferred_element_type=accumulator(x, values),
        )

    def outputs(self, x_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns height and width of the outputs."""
        sizes = zip(x_shape[1:3], self.padding, self.spec.shape[:2], self.strides, strict=True)
        return tuple(
            (size + low + high - tap) // step + 1 for size, (low, high), tap, step in sizes
        )

    def padded(self, x: jax.Array) -> jax.Array:
        """Pads images with zeros."""
        edges = tuple((*pair, 0) for pair in self.padding)
        return lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), *edges, (0, 0, 0)))

    def transposed_padding(self, x_shape: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
        """Returns the padding of dilated outputs for the transposed convolution."""
        pads = []
        sizes = zip(x_shape[1:3], self.outputs(x_shape), self.spec.shape[:2], strict=True)
        for (size, out, tap), (low, _), step in zip(sizes, self.padding, self.strides, strict=True):
            before = tap - 1 - low
            pads.append((before, size + tap - 1 - ((out - 1) * step + 1) - before))
        return tuple(pads)

    def blocked_inputs(self, x: jax.Array) -> jax.Array:
        """Returns images as [input blocks, batch, height, width, r]."""
        return _blocked(x, self.spec.grid[0], self.spec.block.rows)

    def blocked_outputs(self, y: jax.Array) -> jax.Array:
        """Returns outputs as [output blocks, batch, height, width, c]."""
        return _blocked(y, self.spec.grid[1], self.spec.block.cols)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _convolve(
    window: _Window,
    values: jax.Array,
    rows: jax.Array,
    cols: jax.Array,
    x: jax.Array,
    probe: jax.Array | None,
) -> jax.Array:
    del probe
    return _product_of(window, values, rows, cols, x)


def _product_of(
    window: _Window, values: jax.Array, rows: jax.Array, cols: jax.Array, x: jax.Array
) -> jax.Array:
    if not values.shape[0]:
        shape = (x.shape[0], *window.outputs(x.shape), window.spec.shape[-1])
        return _devices.zeros(shape, x.dtype, x, values)
    return lax.platform_dependent(
        values,
        rows,
        cols,
        x,
        cpu=functools.partial(_forward_loop, window),
        default=functools.partial(_forward_grouped, window),
    )


def _forward(window: _Window, *arguments: Any) -> tuple[jax.Array, Any]:
    # This does not call `_convolve`, whose rule is for reverse mode alone: so JAX can differentiate
    # forward through a gradient (Hessian-vector products).
    return _product_of(window, *arguments[:4]), arguments


def _backward(window: _Window, saved: Any, dy: jax.Array) -> tuple[Any, ...]:
    values, rows, cols, x, probe = saved
    dvalues, dx = jnp.zeros_like(values), jnp.zeros_like(x)
    if values.shape[0]:
        dvalues, dx = lax.platform_dependent(
            values,
            rows,
            cols,
            x,
            dy,
            cpu=functools.partial(_backward_loop, window),
            default=functools.partial(_backward_grouped, window),
        )
    dprobe = None
    if probe is not None:
        dprobe = lax.platform_dependent(
            x,
            dy,
            probe,
            cpu=functools.partial(_scores_loop, window),
            default=functools.partial(_scores_grouped, window),
        ).astype(probe.dtype)
    return dvalues, None, None, dx, dprobe


_convolve.defvjp(_forward, _backward)


# ------------------------------------------------------------------------ the loop on the CPU


def _forward_loop(
    window: _Window, values: jax.Array, rows: jax.Array, cols: jax.Array, x: jax.Array
) -> jax.Array:
    spec = window.spec
    (inputs, outputs), block = spec.grid, spec.block
    x = _with_channels(x, inputs * block.rows)
    dtype = accumulator(x, values)

    def add(k: jax.Array, y: jax.Array) -> jax.Array:
        part = window.apply(_channels(x, rows[k], block.rows), values[k])
        return _add_channels(y, part, cols[k])

    shape = (x.shape[0], *window.outputs(x.shape), outputs * block.cols)
    y = lax.fori_loop(0, values.shape[0], add, _devices.zeros(shape, dtype, values, x))
    return y[..., : spec.shape[-1]].astype(x.dtype)


def _backward_loop(
    window: _Window,
    values: jax.Array,
    rows: jax.Array,
    cols: jax.Array,
    x: jax.Array,
    dy: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    spec = window.spec
    (inputs, outputs), block = spec.grid, spec.block
    dtype = accumulator(x, values)
    dy = _with_channels(dy, outputs * block.cols)

    # The transposed convolution, written out. In the one that JAX makes, the convolution itself
    # reverses the kernel and dilates the images, and in a loop that is slow on the CPU.
    turned = values[:, ::-1, ::-1].swapaxes(-1, -2)
    padding = window.transposed_padding(x.shape)
    dilated = tuple((0, 0, stride - 1) for stride in window.strides)

    def add(k: jax.Array, dx: jax.Array) -> jax.Array:
        own = _channels(dy, cols[k], block.cols)
        own = lax.pad(own, jnp.zeros((), own.dtype), ((0, 0, 0), *dilated, (0, 0, 0)))
        part = lax.conv_general_dilated(
            own,
            turned[k],
            (1, 1),
            padding,
            dimension_numbers=_LAYOUT,
            preferred_element_type=dtype,
        )
        return _add_channels(dx, part, rows[k])

    dx = _devices.zeros((*x.shape[:3], inputs * block.rows), dtype, values, dy)
    dx = lax.fori_loop(0, values.shape[0], add, dx)[..., : x.shape[3]].astype(x.dtype)

    padded = window.padded(_with_channels(x, inputs * block.rows))

    def one(place: tuple[jax.Array, jax.Array]) -> jax.Array:
        row, col = place
        images = _channels(padded, row, block.rows)
        return _kernel_gradient(window, images, _channels(dy, col, block.cols), dtype)

    dvalues = lax.map(one, (rows, cols)).reshape(values.shape).astype(values.dtype)
    return _devices.summed(dvalues, values), _devices.summed(dx, x)


def _scores_loop(window: _Window, x: jax.Array, dy: jax.Array, probe: jax.Array) -> jax.Array:
    """Scores all blocks of the dense gradient, a row of blocks at a time."""
    spec = window.spec
    block, (inputs, outputs) = spec.block, spec.grid
    padded = window.padded(_with_channels(x, inputs * block.rows))
    dy = _with_channels(dy, outputs * block.cols)
    dtype = accumulator(x, dy)

    def score(each: tuple[jax.Array, jax.Array]) -> jax.Array:
        row, sizes_O = each
        gradient = _kernel_gradient(window, _channels(padded, row, block.rows), dy, dtype)
        gradient = _devices.summed(gradient, probe)
        return block.score(gradient.reshape(-1, outputs, block.cols), (0, 2), sizes_O)

    return lax.map(score, (jnp.arange(inputs), spec.sizes()))


def _kernel_gradient(
    window: _Window, padded: jax.Array, dy: jax.Array, dtype: jax.typing.DTypeLike
) -> jax.Array:
    """Computes the gradient of a kernel, [taps, in, out], for some rows of the outputs at a time.

    Each tap is a product of the images, shifted, with the gradient of the outputs.
    """
    (height, width), (down, right) = window.spec.shape[:2], window.strides
    batch, rows, columns, outputs = dy.shape
    inputs = padded.shape[3]
    row_size = batch * columns * max(inputs, outputs) * dy.dtype.itemsize
    n = max(n for n in range(1, rows + 1) if rows % n == 0 and (n == 1 or n * row_size <= ROWS))

    def add(total: jax.Array, first: jax.Array) -> tuple[jax.Array, None]:
        own = lax.dynamic_slice_in_dim(dy, first, n, 1).reshape(-1, outputs)
        images = lax.dynamic_slice_in_dim(padded, first * down, (n - 1) * down + height, 1)
        parts = []
        for i in range(height):
            for j in range(width):
                ends = (i + (n - 1) * down + 1, j + (columns - 1) * right + 1)
                shifted = lax.slice(
                    images, (0, i, j, 0), (batch, *ends, inputs), (1, down, right, 1)
                ).reshape(-1, inputs)
                parts.append(dot(shifted, own, (((0,), (0,)), ((), ()))))
        return total + jnp.stack(parts), None

    nothing = _devices.zeros((height * width, inputs, outputs), dtype, padded, dy)
    return lax.scan(add, nothing, jnp.arange(0, rows, n))[0]


def _with_channels(x: jax.Array, channels: int) -> jax.Array:
    missing = channels - x.shape[3]
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, missing))) if missing else x


def _channels(x: jax.Array, block: jax.Array, size: int) -> jax.Array:
    """Returns the channels of a block."""
    return lax.dynamic_slice_in_dim(x, block * size, size, 3)


def _add_channels(x: jax.Array, part: jax.Array, block: jax.Array) -> jax.Array:
    """Adds to the channels of a block."""
    total = _channels(x, block, part.shape[3]) + part
    return lax.dynamic_update_slice_in_dim(x, total, block * part.shape[3], 3)


# --------------------------------------------------------------------------- on accelerators


def _forward_grouped(
    window: _Window, values: jax.Array, rows: jax.Array, cols: jax.Array, x: jax.Array
) -> jax.Array:
    spec = window.spec
    groups, height, width, r, c = values.shape
    gathered = _flat(window.blocked_inputs(x)[rows], groups * r)
    kernels = jnp.moveaxis(values, 0, 3).reshape(height, width, r, groups * c)
    parts = _blocked(window.apply(gathered, kernels, groups), groups, c)
    y = jax.ops.segment_sum(parts, cols, spec.grid[1], indices_are_sorted=True)
    return _flat(y, spec.shape[-1]).astype(x.dtype)


def _backward_grouped(
    window: _Window,
    values: jax.Array,
    rows: jax.Array,
    cols: jax.Array,
    x: jax.Array,
    dy: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    # JAX adds up its own derivatives over devices; in the loop `_devices.summed` does.
    _, pull = jax.vjp(lambda v, a: _forward_grouped(window, v, rows, cols, a), values, x)
    dvalues, dx = pull(dy)
    return dvalues, dx


def _scores_grouped(window: _Window, x: jax.Array, dy: jax.Array, probe: jax.Array) -> jax.Array:
    """Scores all blocks of the dense gradient, a column of blocks at a time."""
    spec = window.spec
    block, (inputs, _) = spec.block, spec.grid
    height, width, channels, _ = spec.shape
    column = jax.ShapeDtypeStruct((height, width, channels, block.cols), x.dtype)
    dtype = accumulator(x, dy)

    def score(each: tuple[jax.Array, jax.Array]) -> jax.Array:
        dy_BxHxWxC, sizes_I = each
        (gradient,) = jax.linear_transpose(lambda v: window.apply(x, v), column)(
            dy_BxHxWxC.astype(dtype)
        )
        gradient = _devices.summed(gradient, probe)
        missing = inputs * block.rows - channels
        padded = jnp.pad(gradient, ((0, 0), (0, 0), (0, missing), (0, 0)))
        tiles = padded.reshape(height * width, inputs, block.rows, block.cols)
        return block.score(tiles, (0, 2, 3), sizes_I)

    return lax.map(score, (window.blocked_outputs(dy), spec.sizes().T)).T


def _blocked(x: jax.Array, blocks: int, size: int) -> jax.Array:
    """Turns [batch, height, width, channels] into [blocks, batch, height, width, size]."""
    missing = blocks * size - x.shape[-1]
    padded = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, missing))) if missing else x
    return jnp.moveaxis(padded.reshape(*x.shape[:3], blocks, size), 3, 0)


def _flat(x: jax.Array, channels: int) -> jax.Array:
    """Inverts `_blocked`."""
    moved = jnp.moveaxis(x, 0, 3)
    return moved.reshape(*moved.shape[:3], -1)[..., :channels]
