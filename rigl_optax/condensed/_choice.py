"""Chooses the blocks of a layer by a table of measured ratios, or dense if that is faster."""

import math
from typing import NamedTuple

import numpy as np

from rigl_optax._structures import Block
from rigl_optax.condensed._measured import DENSITIES, RATIOS, WIDTHS


class Choice(NamedTuple):
    """The fastest blocks of a layer, and how fast they are.

    Attributes:
      block: The fastest of the measured blocks that fit into the layer; None if none does.
      ratio: How many times as fast as dense the layer is with them, forward and backward; 0 if
        no block fits.
    """

    block: Block | None
    ratio: float

    @property
    def pays(self) -> bool:
        """Whether stored blocks are faster than a dense kernel."""
        return self.ratio > 1


def choose(shape: tuple[int, ...], sparsity: float) -> Choice:
    """Chooses the blocks of a layer, by ratios measured on a CPU (`benchmarks/block_shapes.py`).

    The table holds square products at batch 256 and square 3x3 convolutions, for a few widths and
    densities. A layer is looked up at the geometric mean of its widths, interpolated within the
    table and constant beyond it. A 1x1 window counts as a product, any other as 3x3. Another
    machine or batch size may have other ratios: in a run, give `config.method.structure` then.

    Args:
      shape: Shape of the dense kernel, [*window, in, out].
      sparsity: Of the layer, in [0, 1).

    Returns:
      A `Choice`.

    Examples:
      >>> from rigl_optax.condensed import choose
      >>> choose((2048, 2048), 0.95).ratio > 2, choose((32, 10), 0.9).block
      (True, None)
    """
    best = Choice(None, 0.0)
    for size in sorted({size for _, size in RATIOS}):
        block = Block(size, size, pad=True)
        ratio = measured_ratio(shape, sparsity, block)
        if ratio is not None and ratio > best.ratio:
            best = Choice(block, ratio)
    return best


def measured_ratio(shape: tuple[int, ...], sparsity: float, block: Block) -> float | None:
    """Looks up how many times as fast as dense a layer is with some blocks.

    Args:
      shape: As in `choose`, which says how layers are looked up.
      sparsity: Of the layer, in [0, 1).
      block: Its blocks.

    Returns:
      The ratio, forward and backward; None if such blocks were not measured, or are wider than the
      layer.

    Examples:
      >>> import rigl_optax
      >>> from rigl_optax.condensed import measured_ratio
      >>> measured_ratio((2048, 2048), 0.95, rigl_optax.Block(64, 64)) > 2
      True
      >>> measured_ratio((2048, 2048), 0.95, rigl_optax.Block(5, 7))
    """
    kind = "product" if math.prod(shape[:-2]) == 1 else "convolution"
    ratios = RATIOS.get((kind, block.rows))
    if ratios is None or block.rows != block.cols or block.rows > min(shape[-2:]):
        return None
    width = math.sqrt(shape[-2] * shape[-1])
    return _between(ratios, WIDTHS[kind], width, 1 - sparsity)


def _between(
    ratios: tuple[tuple[float, ...], ...], widths: tuple[int, ...], width: float, density: float
) -> float:
    """Interpolates linearly between logarithms; constant beyond the table."""
    at_density = [np.interp(np.log(density), np.log(DENSITIES), row) for row in np.log(ratios)]
    return float(np.exp(np.interp(np.log(width), np.log(widths), at_density)))
