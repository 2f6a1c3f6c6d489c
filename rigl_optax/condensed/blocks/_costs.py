"""Predicts what products of stored blocks cost on an accelerator: operations and bytes."""

import math
from typing import Literal, NamedTuple

from rigl_optax import _numbers
from rigl_optax._structures import Block
from rigl_optax.condensed.blocks._table import PRODUCTS, Product

_SUM = 4  # bytes of the float32 numbers in which products are added up


class Cost(NamedTuple):
    """What one product takes.

    Attributes:
      flops: Additions and multiplications.
      bytes: Read from and written to the device's memory, as if caches held nothing between
        operations, and operations were not fused.
      gathered: Bytes of the copies of activations that blocks need, and of the parts of results
        before they are added up; all exist at one time.
    """

    flops: int
    bytes: int
    gathered: int

    def seconds(self, flops_per_second: float, bytes_per_second: float) -> float:
        """Returns the time at a device's peaks: the larger of computing and of moving bytes."""
        return max(self.flops / flops_per_second, self.bytes / bytes_per_second)


def product_costs(
    product: Product | Literal["dense"],
    tokens: int,
    shape: tuple[int, int],
    block: Block,
    density: float,
    itemsize: int = 2,
) -> dict[str, Cost]:
    """Predicts what a product and both of its gradients cost on a GPU or TPU.

    A bound from arithmetic, not a measurement: no kernel reaches the peaks of a device, caches help
    some, and starting a kernel takes microseconds. Use it to see whether a device can gain at all,
    and by which product; `make accelerator` measures. `ragged` is counted as if XLA had a kernel
    for it; without one its operations are as many times more as there are blocks of outputs, or of
    inputs.

    Args:
      product: One of `condensed.PRODUCTS`, or `dense`.
      tokens: Rows of activations.
      shape: Of the dense kernel, (in, out).
      block: Its blocks, which must divide it.
      density: Fraction of the blocks that are stored, from 0 to 1.
      itemsize: Bytes of a number; 2 for bfloat16.

    Returns:
      `{"forward": Cost, "inputs": Cost, "values": Cost}`: the product and its two gradients.

    Raises:
      ValueError: If the product does not exist, blocks do not divide the kernel, or a number is
        out of range.

    Examples:
      >>> import rigl_optax
      >>> from rigl_optax import condensed
      >>> def forward(product):
      ...     block = rigl_optax.Block(128, 128)
      ...     return condensed.product_costs(product, 8192, (4096, 4096), block, 0.125)["forward"]
      >>> forward("dense").flops / forward("pallas").flops
      8.0
      >>> forward("batched").gathered, forward("pallas").gathered
      (805306368, 0)
    """
    (inputs, outputs), (r, c) = shape, (block.rows, block.cols)
    tokens = _numbers.integer("tokens", tokens, least=1)
    itemsize = _numbers.integer("itemsize", itemsize, least=1)
    if not 0 <= density <= 1:
        raise ValueError(f"density={density!r}: must be from 0 to 1")
    grid = block.grid(shape, "the kernel")
    if product == "dense":
        moved = itemsize * (tokens * (inputs + outputs) + inputs * outputs)
        each = Cost(2 * tokens * inputs * outputs, moved, 0)
        return {"forward": each, "inputs": each, "values": each}
    if product not in PRODUCTS:
        raise ValueError(f"product {product!r}: must be dense or one of {', '.join(PRODUCTS)}")
    blocks = round(density * math.prod(grid))
    if product == "mosaic_gpu":
        return _of_gpu_kernels(tokens, shape, (r, c), blocks, itemsize)
    if product == "pallas":
        return _of_kernels(tokens, shape, (r, c), blocks, itemsize)
    flops = 2 * tokens * blocks * r * c
    stored = blocks * r * c
    x, dy = tokens * inputs, tokens * outputs
    x_parts, dy_parts = tokens * blocks * r, tokens * blocks * c  # activations, block by block
    n = itemsize

    def multiplied(source: int, parts: int, target: int, target_parts: int) -> Cost:
        """The product, or its transpose: activations in and out, whole and block by block."""
        # Read and written by the gather, and read by the product.
        moved = 3 * n * parts + n * stored
        if product == "batched":
            # Put block by block before; parts are written and added up, and rounded after.
            moved += 2 * n * source + 2 * _SUM * target_parts + (2 * _SUM + n) * target
            return Cost(flops, moved, n * parts + _SUM * target_parts)
        return Cost(flops, moved + (2 * _SUM + n) * target, n * parts)

    if product == "batched":
        values = 3 * n * (x_parts + dy_parts) + 2 * n * (x + dy) + _SUM * stored
        gathered = n * (x_parts + dy_parts)
    else:
        values = 3 * n * x_parts + 3 * n * dy + _SUM * stored
        gathered = n * x_parts
    return {
        "forward": multiplied(x, x_parts, dy, dy_parts),
        "inputs": multiplied(dy, dy_parts, x, x_parts),
        "values": Cost(flops, values, gathered),
    }


def _of_kernels(
    tokens: int, shape: tuple[int, int], block: tuple[int, int], blocks: int, itemsize: int
) -> dict[str, Cost]:
    """The same of the kernels for TPUs, which gather nothing."""
    from rigl_optax.condensed.blocks import _pallas_tpu as kernels

    (inputs, outputs), (r, c), n = shape, block, itemsize
    flops, stored = 2 * tokens * blocks * r * c, blocks * r * c
    x, dy = tokens * inputs, tokens * outputs
    # Narrow blocks are copied into another order.
    x_copied = 0 if r % kernels.LANES == 0 else 2 * n * x
    dy_copied = 0 if c % kernels.LANES == 0 else 2 * n * dy

    def multiplied(source: int, width: int, target: int) -> Cost:
        tiles = -(-tokens // kernels.rows_at_once(tokens, width * n))
        # Activations once, blocks for each tile of them; the result is written, and read and
        # written again where zeros are put into what has no blocks.
        return Cost(flops, n * (source + tiles * stored + 3 * target) + x_copied + dy_copied, 0)

    values = n * (tokens * blocks * r + dy) + _SUM * stored + x_copied + dy_copied
    return {
        "forward": multiplied(x, inputs, dy),
        "inputs": multiplied(dy, outputs, x),
        "values": Cost(flops, values, 0),
    }


def _of_gpu_kernels(
    tokens: int, shape: tuple[int, int], block: tuple[int, int], blocks: int, itemsize: int
) -> dict[str, Cost]:
    """The same of the kernels for GPUs, which read activations again for each block."""
    from rigl_optax.condensed.blocks import _mosaic_gpu as kernels

    (inputs, outputs), (r, c), n = shape, block, itemsize
    flops, stored = 2 * tokens * blocks * r * c, blocks * r * c

    def multiplied(size: int, target: int, other: int) -> int:
        tiles = -(-tokens // kernels.rows_of(other))
        # Each program reads its rows of the activations of all its blocks, and the blocks.
        return n * (tokens * blocks * size + tiles * stored + tokens * target)

    forward = multiplied(r, outputs, c)
    # A transposed copy of the values is written, and read by that much.
    backward = multiplied(c, inputs, r) + 2 * n * stored
    parts = r // kernels.rows_of_part(r, c)
    values = n * tokens * blocks * (r + parts * c) + _SUM * stored
    return {
        "forward": Cost(flops, forward, 0),
        "inputs": Cost(flops, backward, 0),
        "values": Cost(flops, values, 0),
    }
