"""Which blocks make a layer quick: a small table of measured ratios, and where dense wins."""

import math
from typing import NamedTuple

import numpy as np

from rigl_optax._structures import Block
from rigl_optax.condensed._measured import DENSITIES, RATIOS, WIDTHS


class Choice(NamedTuple):
    """What is to be expected of a layer.

    Attributes:
      block: The quickest of the measured ones that fit into the layer; None if none does.
      ratio: Times as fast as dense, forward and backward, with that block; 0 if none fits.
    """

    block: Block | None
    ratio: float

    @property
    def pays(self) -> bool:
        """Whether stored blocks are quicker than dense."""
        return self.ratio > 1


def choose(shape: tuple[int, ...], sparsity: float) -> Choice:
    """The blocks of a layer, from ratios measured on a CPU (`benchmarks/block_shapes.py`).

    The table has products at batch 256 and 3x3 convolutions, square ones of few widths at few
    densities. A layer is looked up at the mean width of its ends, in between by interpolation, at
    the edge of the table beyond it; any window counts as 3x3 but 1x1, which counts as a product.
    What is quick on another machine, or at another batch, may differ: give
    `config.method.structure`.

    Args:
      shape: Of the dense kernel, [*window, in, out].
      sparsity: Of the layer, in [0, 1).

    Returns:
      A `Choice`.

    Example:
      >>> from rigl_optax.condensed import choose
      >>> choose((2048, 2048), 0.95).ratio > 2, choose((32, 10), 0.9).block
      (True, None)
    """
    kind = "product" if math.prod(shape[:-2]) == 1 else "convolution"
    best = Choice(None, 0.0)
    for (measured, size), ratios in RATIOS.items():
        if measured == kind and size <= min(shape[-2:]):
            width = math.sqrt(shape[-2] * shape[-1])
            ratio = _between(ratios, WIDTHS[kind], width, 1 - sparsity)
            if ratio > best.ratio:
                best = Choice(Block(size, size, pad=True), ratio)
    return best


def _between(
    ratios: tuple[tuple[float, ...], ...], widths: tuple[int, ...], width: float, density: float
) -> float:
    """The ratio at a width and a density; linear in the logarithms, constant beyond the table."""
    at_density = [np.interp(np.log(density), np.log(DENSITIES), row) for row in np.log(ratios)]
    return float(np.exp(np.interp(np.log(width), np.log(widths), at_density)))
