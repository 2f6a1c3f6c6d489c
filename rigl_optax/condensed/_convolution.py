"""Convolutions with stored blocks of channels; all taps of a block are together.

On the CPU a loop over the blocks: products with shifted slices of the pixels, a tile at a time
(a convolution for each block was 6 times slower than the dense one); elsewhere one grouped
convolution of gathered channels, and a segment sum.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from rigl_optax.condensed import _devices, _product
from rigl_optax.condensed._kernel import BlockSparse, Spec, common_dtype, matmul

Padding = str | Sequence[tuple[int, int]]
_LAYOUT = ("NHWC", "HWIO", "NHWC")
# Pixels at a time: all taps of a block of 32 channels on them stay in the second cache level.
_TILE = 256


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
        # Accelerators are best at matmuls. On the CPU a tile of pixels at a time stays in the
        # cache, where a matmul would transpose all of them first.
        return lax.platform_dependent(
            x[:, :: strides[0], :: strides[1]],
            kernel,
            cpu=functools.partial(_windowed, (1, 1), pads),
            default=matmul,
        )
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
        """[input blocks, batch, height, width, r]."""
        return _blocked(x, self.spec.grid[0], self.spec.block.rows)

    def blocked_outputs(self, y: jax.Array) -> jax.Array:
        """[output blocks, batch, height, width, c]."""
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
        shape = jax.eval_shape(window.apply, x, dense).shape
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
#
# Pixels of padded images lie side by side, so that a tap of the window is a shift: where the
# windows start at the outputs' pixels p, tap t sees the pixel p + offset(t). With strides the
# images are cut into phases, one for each place of a pixel within a stride, and a tap sees the
# same shift of one phase. Outputs at the seams between images are computed and thrown away.


class _Shifts(NamedTuple):
    """Where the taps of a window are among the pixels of phases, all static."""

    phases: tuple[int, ...]  # of each tap
    offsets: tuple[int, ...]
    height: int  # of an image of one phase
    width: int
    outputs: tuple[int, int]  # height and width of what comes out

    @property
    def halo(self) -> int:
        """How far a tap may look."""
        return max(self.offsets)


def _shifts(window: _Window, x_shape: tuple[int, ...]) -> _Shifts:
    taps, strides = window.spec.shape[:2], window.strides
    outputs = tuple(
        (size + low + high - tap) // stride + 1
        for size, (low, high), tap, stride in zip(
            x_shape[1:3], window.padding, taps, strides, strict=True
        )
    )
    height, width = (
        out - 1 - (-tap // stride) for out, tap, stride in zip(outputs, taps, strides, strict=True)
    )
    places = [(i, j) for i in range(taps[0]) for j in range(taps[1])]
    phases = tuple((i % strides[0]) * strides[1] + j % strides[1] for i, j in places)
    offsets = tuple((i // strides[0]) * width + j // strides[1] for i, j in places)
    return _Shifts(phases, offsets, height, width, (outputs[0], outputs[1]))


def _as_phases(window: _Window, shifts: _Shifts, x: jax.Array) -> jax.Array:
    """Images as [phases, input blocks, r, pixels], with zeros after the last pixel."""
    block, (inputs, _) = window.spec.block, window.spec.grid
    strides, sizes = window.strides, (shifts.height, shifts.width)
    edges = [(0, 0, 0)]
    for n, (low, _), size, stride in zip(x.shape[1:3], window.padding, sizes, strides, strict=True):
        edges.append((low, size * stride - n - low, 0))  # may cut off what no window sees
    edges.append((0, inputs * block.rows - x.shape[3], 0))
    x = lax.pad(x, jnp.zeros((), x.dtype), edges)
    x = x.reshape(x.shape[0], sizes[0], strides[0], sizes[1], strides[1], inputs, block.rows)
    x = x.transpose(2, 4, 5, 6, 0, 1, 3).reshape(
        -1, inputs, block.rows, x.shape[0] * math.prod(sizes)
    )
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, shifts.halo + -x.shape[-1] % _TILE)))


def _from_phases(window: _Window, shifts: _Shifts, x: jax.Array, like: jax.Array) -> jax.Array:
    """The inverse of `_as_phases`: what no window sees gets 0."""
    (batch, *_, channels), strides = like.shape, window.strides
    sizes = (shifts.height, shifts.width)
    x = x[..., : batch * math.prod(sizes)]
    x = x.reshape(*strides, -1, batch, *sizes)[:, :, :channels]
    x = x.transpose(3, 4, 0, 5, 1, 2).reshape(
        batch, sizes[0] * strides[0], sizes[1] * strides[1], channels
    )
    edges = [(0, 0, 0)]
    for n, (low, _), whole in zip(like.shape[1:3], window.padding, x.shape[1:3], strict=True):
        edges.append((-low, n - (whole - low), 0))
    return lax.pad(x, jnp.zeros((), x.dtype), [*edges, (0, 0, 0)])


def _outputs_as_pixels(window: _Window, shifts: _Shifts, dy: jax.Array) -> jax.Array:
    """[output blocks, c, pixels], zero at the seams."""
    block, (_, outputs) = window.spec.block, window.spec.grid
    missing = (
        shifts.height - shifts.outputs[0],
        shifts.width - shifts.outputs[1],
        outputs * block.cols - dy.shape[3],
    )
    dy = jnp.pad(dy, ((0, 0), *((0, n) for n in missing)))
    dy = jnp.moveaxis(dy, 3, 0).reshape(outputs, block.cols, -1)
    return jnp.pad(dy, ((0, 0), (0, 0), (0, -dy.shape[-1] % _TILE)))


def _outputs_from_pixels(
    window: _Window, shifts: _Shifts, y_OxCxP: jax.Array, batch: int
) -> jax.Array:
    pixels = batch * shifts.height * shifts.width
    channels = window.spec.shape[-1]
    y = y_OxCxP.reshape(-1, y_OxCxP.shape[-1])[:channels, :pixels]
    y = y.reshape(channels, batch, shifts.height, shifts.width)
    return jnp.moveaxis(y[:, :, : shifts.outputs[0], : shifts.outputs[1]], 0, 3)


def _patch(x: jax.Array, starts: Sequence[tuple[Any, ...]]) -> jax.Array:
    """Slices of a tile of pixels, one for each tap, one above the other."""
    size = (*(1,) * (x.ndim - 2), x.shape[-2], _TILE)

    def of_tap(start: tuple[Any, ...]) -> jax.Array:
        indices = [jnp.asarray(i, jnp.int32) for i in start]  # of one type, with x64 too
        return lax.dynamic_slice(x, indices, size).reshape(x.shape[-2], _TILE)

    return jnp.concatenate([of_tap(start) for start in starts])


def _forward_loop(
    window: _Window, values: jax.Array, rows: jax.Array, cols: jax.Array, x: jax.Array
) -> jax.Array:
    spec, shifts = window.spec, _shifts(window, x.shape)
    pixels = _as_phases(window, shifts, x)
    stacked = values.reshape(values.shape[0], -1, spec.block.cols)  # taps above each other
    dtype = _product.accumulator(x, values)

    def of_tile(first: jax.Array) -> jax.Array:
        def add(k: jax.Array, y_OxCxT: jax.Array) -> jax.Array:
            taps = zip(shifts.phases, shifts.offsets, strict=True)
            patch = _patch(pixels, [(phase, rows[k], 0, first + offset) for phase, offset in taps])
            part = lax.dot_general(
                stacked[k], patch, (((0,), (0,)), ((), ())), preferred_element_type=dtype
            )
            return y_OxCxT.at[cols[k]].add(part, mode="promise_in_bounds")

        y = _devices.zeros((spec.grid[1], spec.block.cols, _TILE), dtype, values, x)
        return lax.fori_loop(0, values.shape[0], add, y)

    firsts = jnp.arange(0, pixels.shape[-1] - shifts.halo, _TILE)
    y = _untiled(lax.map(of_tile, firsts))
    return _outputs_from_pixels(window, shifts, y, x.shape[0]).astype(x.dtype)


def _backward_loop(
    window: _Window,
    values: jax.Array,
    rows: jax.Array,
    cols: jax.Array,
    x: jax.Array,
    dy: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    spec, shifts = window.spec, _shifts(window, x.shape)
    block, dtype = spec.block, _product.accumulator(x, values)
    pixels = _as_phases(window, shifts, x)
    dy_OxCxP = _outputs_as_pixels(window, shifts, dy)
    firsts = jnp.arange(0, dy_OxCxP.shape[-1], _TILE)

    def add_tile(total: jax.Array, first: jax.Array) -> tuple[jax.Array, None]:
        def one(place: tuple[jax.Array, jax.Array]) -> jax.Array:
            row, col = place
            taps = zip(shifts.phases, shifts.offsets, strict=True)
            patch = _patch(pixels, [(phase, row, 0, first + offset) for phase, offset in taps])
            above = _patch(dy_OxCxP, [(col, 0, first)])
            return lax.dot_general(
                patch, above, (((1,), (1,)), ((), ())), preferred_element_type=dtype
            )

        return total + lax.map(one, (rows, cols)), None

    shape = (values.shape[0], math.prod(values.shape[1:4]), block.cols)
    nothing = _devices.zeros(shape, dtype, x, dy)
    dvalues = lax.scan(add_tile, nothing, firsts)[0].reshape(values.shape).astype(values.dtype)

    # A pixel of the input is seen from as far before it as a tap looks ahead.
    before = jnp.pad(dy_OxCxP, ((0, 0), (0, 0), (shifts.halo, 0)))
    by_phase = [
        [t for t, at in enumerate(shifts.phases) if at == phase]
        for phase in range(math.prod(window.strides))
    ]
    taps = values.reshape(values.shape[0], -1, block.rows, block.cols)
    kernels = [taps[:, jnp.asarray(own)] for own in by_phase if own]

    def of_tile(first: jax.Array) -> jax.Array:
        def add(k: jax.Array, dx: jax.Array) -> jax.Array:
            used = [(phase, own) for phase, own in enumerate(by_phase) if own]
            for (phase, own), kernel in zip(used, kernels, strict=True):
                starts = [(cols[k], 0, first + shifts.halo - shifts.offsets[t]) for t in own]
                kernel_RxTC = kernel[k].transpose(1, 0, 2).reshape(block.rows, -1)
                part = lax.dot_general(
                    kernel_RxTC,
                    _patch(before, starts),
                    (((1,), (0,)), ((), ())),
                    preferred_element_type=dtype,
                )
                dx = dx.at[phase, rows[k]].add(part, mode="promise_in_bounds")
            return dx

        shape = (len(by_phase), spec.grid[0], block.rows, _TILE)
        dx = _devices.zeros(shape, dtype, values, dy)
        return lax.fori_loop(0, values.shape[0], add, dx)

    dx = _from_phases(window, shifts, _untiled(lax.map(of_tile, firsts)), x).astype(x.dtype)
    return _devices.summed(dvalues, values), _devices.summed(dx, x)


def _scores_loop(window: _Window, x: jax.Array, dy: jax.Array, probe: jax.Array) -> jax.Array:
    """Scores of all blocks of the dense gradient, a row of blocks at a time."""
    spec, shifts = window.spec, _shifts(window, x.shape)
    block, (inputs, outputs) = spec.block, spec.grid
    pixels = _as_phases(window, shifts, x)
    dy_OCxP = _outputs_as_pixels(window, shifts, dy).reshape(outputs * block.cols, -1)
    firsts = jnp.arange(0, dy_OCxP.shape[-1], _TILE)
    dtype = _product.accumulator(x, dy)

    def score(each: tuple[jax.Array, jax.Array]) -> jax.Array:
        row, sizes_O = each

        def add_tile(total: jax.Array, first: jax.Array) -> tuple[jax.Array, None]:
            taps = zip(shifts.phases, shifts.offsets, strict=True)
            patch = _patch(pixels, [(phase, row, 0, first + offset) for phase, offset in taps])
            product = lax.dot_general(
                patch,
                _patch(dy_OCxP, [(0, first)]),
                (((1,), (1,)), ((), ())),
                preferred_element_type=dtype,
            )
            return total + product, None

        shape = (len(shifts.offsets) * block.rows, outputs * block.cols)
        nothing = _devices.zeros(shape, dtype, x, dy)
        gradient = _devices.summed(lax.scan(add_tile, nothing, firsts)[0], probe)
        return block.score(gradient.reshape(-1, outputs, block.cols), (0, 2), sizes_O)

    return lax.map(score, (jnp.arange(inputs), spec.sizes()))


def _untiled(x: jax.Array) -> jax.Array:
    """[tiles, ..., pixels of a tile] as [..., pixels]."""
    moved = jnp.moveaxis(x, 0, -2)
    return moved.reshape(*moved.shape[:-2], -1)


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
    # JAX's own derivative sums over devices by itself, as the loop does.
    _, pull = jax.vjp(lambda v, a: _forward_grouped(window, v, rows, cols, a), values, x)
    dvalues, dx = pull(dy)
    return dvalues, dx


def _scores_grouped(window: _Window, x: jax.Array, dy: jax.Array, probe: jax.Array) -> jax.Array:
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
        gradient = _devices.summed(gradient, probe)
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
