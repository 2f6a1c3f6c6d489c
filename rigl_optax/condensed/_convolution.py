"""Convolutions with stored blocks of channels; all taps of a block are together.

On the CPU a loop of convolutions of single blocks, between slices of channels; elsewhere one
grouped convolution of gathered channels, and a segment sum.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from rigl_optax.condensed import _product
from rigl_optax.condensed._kernel import BlockSparse, Spec, common_dtype, matmul

Padding = str | Sequence[tuple[int, int]]
_LAYOUT = ("NHWC", "HWIO", "NHWC")


def convolve(
    x: jax.Array, kernel: BlockSparse, *, strides: Sequence[int] = (1, 1), padding: Padding = "SAME"
) -> jax.Array:
    """Convolution of images with a condensed kernel.

    Args:
      x: [batch, height, width, in channels].
      kernel: Of shape [height, width, in, out].
      strides: Of the window.
      padding: `SAME`, `VALID`, or pairs of what is added at both ends of height and width.

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
        return matmul(x[:, :: strides[0], :: strides[1]], kernel)
    dtype = common_dtype(x, kernel.values)
    spec = _Window(Spec(kernel.topology.block, shape), tuple(strides), pads)
    topology = kernel.topology
    return _convolve(
        spec, kernel.values.astype(dtype), topology.rows, topology.cols, x.astype(dtype),
        kernel.probe,
    )  # fmt: skip


class _Window(NamedTuple):
    """What is static of a convolution."""

    spec: Spec
    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]

    def apply(self, x: jax.Array, values: jax.Array, groups: int = 1) -> jax.Array:
        return lax.conv_general_dilated(
            x,
            values,
            self.strides,
            self.padding,
            dimension_numbers=_LAYOUT,
            feature_group_count=groups,
            preferred_element_type=_product.accumulator(x, values),
        )

    def blocked_inputs(self, x: jax.Array) -> jax.Array:
        return _blocked(x, self.spec.grid[0], self.spec.block.rows)

    def blocked_outputs(self, y: jax.Array) -> jax.Array:
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
    if not values.shape[0]:
        spec = window.spec
        dense = jax.ShapeDtypeStruct(spec.shape, x.dtype)
        return jnp.zeros(jax.eval_shape(window.apply, x, dense).shape, x.dtype)
    return lax.platform_dependent(
        values,
        rows,
        cols,
        x,
        cpu=functools.partial(_forward_loop, window),
        default=functools.partial(_forward_grouped, window),
    )


def _forward(window: _Window, *arguments: Any) -> tuple[jax.Array, Any]:
    return _convolve(window, *arguments), arguments


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
    dprobe = None if probe is None else _scores(window, x, dy).astype(probe.dtype)
    return dvalues, None, None, dx, dprobe


_convolve.defvjp(_forward, _backward)


def _forward_loop(
    window: _Window, values: jax.Array, rows: jax.Array, cols: jax.Array, x: jax.Array
) -> jax.Array:
    spec = window.spec
    x_IxBxHxWxR = window.blocked_inputs(x)
    part = jax.eval_shape(window.apply, x_IxBxHxWxR[0], values[0])

    def add(k: jax.Array, y: jax.Array) -> jax.Array:
        each = window.apply(x_IxBxHxWxR[rows[k]], values[k])
        return y.at[cols[k]].add(each, mode="promise_in_bounds")

    y = lax.fori_loop(0, values.shape[0], add, jnp.zeros((spec.grid[1], *part.shape), part.dtype))
    return _flat(y, spec.shape[-1]).astype(x.dtype)


def _backward_loop(
    window: _Window,
    values: jax.Array,
    rows: jax.Array,
    cols: jax.Array,
    x: jax.Array,
    dy: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    x_IxBxHxWxR, dy_OxBxHxWxC = window.blocked_inputs(x), window.blocked_outputs(dy)
    dtype = _product.accumulator(x, values)

    def add(dx: jax.Array, each: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        value, row, col = each
        _, pull = jax.vjp(window.apply, x_IxBxHxWxR[row], value)
        more, dvalue = pull(dy_OxBxHxWxC[col].astype(dtype))
        return dx.at[row].add(more.astype(dtype), mode="promise_in_bounds"), dvalue

    dx, dvalues = lax.scan(add, jnp.zeros(x_IxBxHxWxR.shape, dtype), (values, rows, cols))
    return dvalues, _flat(dx, window.spec.shape[-2]).astype(x.dtype)


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
    _, pull = jax.vjp(lambda v, a: _forward_grouped(window, v, rows, cols, a), values, x)
    dvalues, dx = pull(dy)
    return dvalues, dx


def _scores(window: _Window, x: jax.Array, dy: jax.Array) -> jax.Array:
    """Scores of all blocks of the dense gradient, a column of blocks at a time."""
    spec = window.spec
    block, (inputs, _) = spec.block, spec.grid
    height, width, channels, _ = spec.shape
    column = jax.ShapeDtypeStruct((height, width, channels, block.cols), x.dtype)
    dtype = _product.accumulator(x, dy)

    def score(each: tuple[jax.Array, jax.Array]) -> jax.Array:
        dy_BxHxWxC, sizes_I = each
        (gradient,) = jax.linear_transpose(lambda v: window.apply(x, v), column)(
            dy_BxHxWxC.astype(dtype)
        )
        missing = inputs * block.rows - channels
        padded = jnp.pad(gradient, ((0, 0), (0, 0), (0, missing), (0, 0)))
        tiles = padded.reshape(height * width, inputs, block.rows, block.cols)
        return block.score(tiles, (0, 2, 3), sizes_I)

    return lax.map(score, (window.blocked_outputs(dy), spec.sizes().T)).T


def _blocked(x: jax.Array, blocks: int, size: int) -> jax.Array:
    """[batch, height, width, channels] as [blocks, batch, height, width, size]."""
    missing = blocks * size - x.shape[-1]
    padded = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, missing))) if missing else x
    return jnp.moveaxis(padded.reshape(*x.shape[:3], blocks, size), 3, 0)


def _flat(x: jax.Array, channels: int) -> jax.Array:
    moved = jnp.moveaxis(x, 0, 3)
    return moved.reshape(*moved.shape[:3], -1)[..., :channels]
