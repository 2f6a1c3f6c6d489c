"""Products of stored blocks as Mosaic GPU kernels, for Hopper: a program makes one result.

It reads the list of its blocks, and copies what the next step needs while the tensor cores compute.
Nothing is gathered, sums stay in registers, in float32, and each result is written once. No device
has run these kernels: `docs/accelerators.md` says what was checked.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from rigl_optax.condensed import _devices
from rigl_optax.condensed._dot import accumulator
from rigl_optax.condensed.blocks._product import padded

# A step contracts this many numbers: 16-bit ones are as wide as the largest swizzle, 128 bytes.
STEP = 64
# Numbers of a sum that a warpgroup of 128 threads holds in registers, 128 in each.
SUM = 128 * 128
SIDE = 256  # the widest result of an instruction
DTYPES = (jnp.bfloat16, jnp.float16)


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
    _check(values, x)
    order = jnp.arange(values.shape[0], dtype=jnp.int32)
    y = _multiply(values, order, rows, cols, x, features, interpret)
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
    _check(values, x, dy)
    order = jnp.argsort(rows, stable=True).astype(jnp.int32)
    # The stored values are the smallest array: a transposed copy costs little.
    transposed = values.swapaxes(1, 2)
    dx = _multiply(transposed, order, cols[order], rows[order], dy, x.shape[1], interpret)
    dvalues = _values(rows, cols, x, dy, values.shape, interpret)
    return dx.astype(accumulator(values, dy)), dvalues


def _check(values: jax.Array, *arrays: jax.Array) -> None:
    block, dtypes = values.shape[1:], {x.dtype for x in (values, *arrays)}
    if any(side % STEP or side > SIDE for side in block):
        raise ValueError(
            f"product 'mosaic_gpu': blocks of {block[0]}x{block[1]}; sides must be multiples of "
            f"{STEP}, up to {SIDE}"
        )
    if len(dtypes) > 1 or dtypes.isdisjoint(map(jnp.dtype, DTYPES)):
        names = ", ".join(sorted(dtype.name for dtype in dtypes))
        raise ValueError(f"product 'mosaic_gpu': {names}; must be all bfloat16 or all float16")
    if not all(isinstance(n, int) for x in arrays for n in x.shape):
        raise ValueError("product 'mosaic_gpu': the size of the batch must be known")
    if _devices.differs(values, *arrays):
        raise ValueError("product 'mosaic_gpu': neither shard_map nor explicit axes are supported")


def _multiply(
    values: jax.Array,
    order: jax.Array,
    sources: jax.Array,
    targets: jax.Array,
    x: jax.Array,
    features: int,
    interpret: bool,
) -> jax.Array:
    """Multiplies the columns `sources` of x by blocks; adds up the products at `targets`.

    A program takes some rows of x and one target, and goes through the blocks of the target, which
    follow each other. A target without blocks is 0.

    Args:
      values: [blocks, r, c].
      order: int32 [blocks]: index of the block that comes first, and so on.
      sources: int32 [blocks]: the columns of x that each block multiplies, in this order.
      targets: int32 [blocks]: the columns of the result that it adds to, ascending.
      x: [batch, features].
      features: Number of columns of the result.
      interpret: Whether the kernel is interpreted.
    """
    batch, (n, r, c) = x.shape[0], values.shape
    groups = -(-features // c)
    if not n or not batch:
        return jnp.zeros((batch, features), x.dtype)
    tile = rows_of(c)
    x = _rows_padded(padded(x, -(-x.shape[1] // r) * r), tile)
    starts = jnp.searchsorted(targets, jnp.arange(groups + 1, dtype=targets.dtype))
    per_block = r // STEP

    def kernel(
        starts: Any, order: Any, sources: Any, x: Any, w: Any, y: Any, xs: Any, ws: Any, ys: Any,
        arrived: Any,
    ) -> None:  # fmt: skip
        m, target = pl.ds(lax.axis_index("m") * tile, tile), lax.axis_index("target")
        first = starts[target]

        def copy(step: jax.Array, slot: jax.Array) -> None:
            b, k = first + step // per_block, step % per_block * STEP
            part = x.at[m, pl.ds(sources[b] * r + k, STEP)]
            plgpu.copy_gmem_to_smem(part, xs.at[slot], arrived.at[slot])
            part = w.at[order[b], pl.ds(k, STEP)]
            plgpu.copy_gmem_to_smem(part, ws.at[slot], arrived.at[slot])

        steps = (starts[target + 1] - first) * per_block
        multiply = lambda total, slot: plgpu.wgmma(total, xs.at[slot], ws.at[slot])  # noqa: E731
        ys[...] = _summed(steps, copy, multiply, arrived, (tile, c)).astype(ys.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(ys, y.at[m, pl.ds(target * c, c)])
        plgpu.wait_smem_to_gmem(0)

    y = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((x.shape[0], groups * c), x.dtype),
        grid=(x.shape[0] // tile, groups),
        grid_names=("m", "target"),
        scratch_types=[
            _shared((2, tile, STEP), x.dtype),
            _shared((2, STEP, c), x.dtype),
            _shared((tile, c), x.dtype),
            plgpu.Barrier(num_arrivals=2, num_barriers=2),
        ],
        **_how(interpret),
    )(starts.astype(jnp.int32), order, sources.astype(jnp.int32), x, values)
    return y[:batch, :features]


def _values(
    rows: jax.Array,
    cols: jax.Array,
    x: jax.Array,
    dy: jax.Array,
    shape: tuple[int, ...],
    interpret: bool,
) -> jax.Array:
    """Computes the gradient of the stored values alone, float32 [blocks, r, c].

    A program takes some rows of one block, and goes through the batch.
    """
    n, r, c = shape
    if not n or not x.shape[0]:
        return jnp.zeros(shape, jnp.float32)
    x = _rows_padded(padded(x, -(-x.shape[1] // r) * r), STEP)
    dy = _rows_padded(padded(dy, -(-dy.shape[1] // c) * c), STEP)
    steps, tile = x.shape[0] // STEP, rows_of_part(r, c)

    def kernel(
        rows: Any, cols: Any, x: Any, dy: Any, dw: Any, xs: Any, ds: Any, ws: Any, arrived: Any
    ) -> None:
        b, part = lax.axis_index("block"), lax.axis_index("part") * tile
        row, col = rows[b] * r + part, cols[b] * c

        def copy(step: jax.Array, slot: jax.Array) -> None:
            m = pl.ds(step * STEP, STEP)
            plgpu.copy_gmem_to_smem(x.at[m, pl.ds(row, tile)], xs.at[slot], arrived.at[slot])
            plgpu.copy_gmem_to_smem(dy.at[m, pl.ds(col, c)], ds.at[slot], arrived.at[slot])

        def multiply(total: Any, slot: jax.Array) -> None:
            plgpu.wgmma(total, xs.at[slot].transpose((1, 0)), ds.at[slot])

        ws[...] = _summed(jnp.int32(steps), copy, multiply, arrived, (tile, c))
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(ws, dw.at[b, pl.ds(part, tile)])
        plgpu.wait_smem_to_gmem(0)

    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct(shape, jnp.float32),
        grid=(n, r // tile),
        grid_names=("block", "part"),
        scratch_types=[
            _shared((2, STEP, tile), x.dtype),
            _shared((2, STEP, c), x.dtype),
            _shared((tile, c), jnp.float32),
            plgpu.Barrier(num_arrivals=2, num_barriers=2),
        ],
        **_how(interpret),
    )(rows.astype(jnp.int32), cols.astype(jnp.int32), x, dy)


def _summed(
    steps: jax.Array, copy: Any, multiply: Any, arrived: Any, shape: tuple[int, int]
) -> jax.Array:
    """Adds up the products of all steps; a step's copies run while the one before multiplies."""

    @pl.when(steps > 0)
    def _() -> None:
        copy(jnp.int32(0), jnp.int32(0))

    def scope(total: Any) -> jax.Array:
        @pl.loop(0, steps)
        def _(step: jax.Array) -> None:
            slot = lax.rem(step, jnp.int32(2))

            # The other slot is free: the multiplication before has ended.
            @pl.when(step + 1 < steps)
            def _() -> None:
                copy(step + 1, 1 - slot)

            plgpu.barrier_wait(arrived.at[slot])
            multiply(total, slot)
            plgpu.wgmma_wait(0)

        return total[...]

    return pl.run_scoped(scope, plgpu.ACC(shape, jnp.float32))


def rows_of(c: int) -> int:
    """Returns how many rows of a result with `c` columns a program takes."""
    return 128 if 128 * c <= SUM else 64


def rows_of_part(r: int, c: int) -> int:
    """Returns how many rows of the gradient of a block of r x c a program takes."""
    return STEP if r % 128 else rows_of(c)


def _rows_padded(x: jax.Array, tile: int) -> jax.Array:
    return jnp.pad(x, ((0, -x.shape[0] % tile), (0, 0)))


def _shared(shape: tuple[int, ...], dtype: Any) -> Any:
    """Returns shared memory as the tensor cores read it: 8 rows of 128 bytes each, swizzled."""
    tiles = (8, 128 // jnp.dtype(dtype).itemsize)
    transforms = plgpu.TilingTransform(tiles), plgpu.SwizzleTransform(128)
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def _how(interpret: bool) -> dict[str, Any]:
    mosaic: Any = plgpu  # JAX 0.10 has no interpreter
    return {"interpret": mosaic.InterpretGPUParams()} if interpret else {}
