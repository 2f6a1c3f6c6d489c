"""Finds widths: a dense network of a sparse one's bytes, a sparse one of a dense one's FLOPs."""

import math
from collections.abc import Callable

import jax

from rigl_optax._types import PyTree


def small_dense_width(
    params_of_width: Callable[[float], PyTree], target_bytes: float, *, tolerance: float = 1e-3
) -> float:
    """Finds the largest width multiplier in (0, 1] at which a model fits into `target_bytes`.

    Small-Dense is the control that spends the storage of a sparse network on a narrow dense
    one (paper, section 4). The target is the sparse network's size with its bit mask, as in the
    paper's accounting: 4 bytes for an active weight and a bit for every weight.

    Args:
      params_of_width: `params_of_width(multiplier)`, parameters or their shapes; their size must
        not decrease with the multiplier. For LeNet all hidden widths are multiplied.
      target_bytes: Bytes that the parameters may take.
      tolerance: Accuracy of the multiplier, and the smallest one that is tried.

    Returns:
      The multiplier.

    Raises:
      ValueError: If even the narrowest network (multiplier `tolerance`) is larger.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> kernel = lambda w: {"kernel": jax.ShapeDtypeStruct((100, round(100 * w)), jnp.float32)}
      >>> width = small_dense_width(kernel, 4 * 100 * 25)
      >>> round(width, 2)
      0.25
    """

    def size(width: float) -> int:
        leaves = jax.tree.leaves(params_of_width(width))
        return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)

    low, high = tolerance, 1.0
    if size(high) <= target_bytes:
        return high
    if size(low) > target_bytes:
        raise ValueError(
            f"target_bytes={target_bytes:g}: the narrowest network takes {size(low)} bytes"
        )
    return _largest(lambda width: size(width) <= target_bytes, low, high, tolerance)


def iso_flop_width(
    flops_of_width: Callable[[float], float], target_flops: float, *, tolerance: float = 1e-3
) -> float:
    """Finds the largest width multiplier, 1 or more, at which a sparse model costs `target_flops`.

    Use it to compare at equal FLOPs instead of equal widths: a wide sparse network against the
    dense one that costs as much. A single layer whose inputs and outputs both widen costs the same
    at a multiplier of 1 / sqrt(1 - sparsity).

    Args:
      flops_of_width: `flops_of_width(multiplier)`, FLOPs of a forward pass of the sparse model, as
        `explain(params_of_width(multiplier), sparsity, ...).flops_sparse`. They must grow with the
        multiplier, without bound.
      target_flops: FLOPs that a forward pass may cost: those of the dense model, as `flops_dense`.
      tolerance: Accuracy of the multiplier.

    Returns:
      The multiplier, for `config.model.width` or a model of your own.

    Raises:
      ValueError: If the sparse model costs more at a multiplier of 1, or no more at one of 1,024.

    Examples:
      >>> dense = lambda width: 2 * (100 * width) * (100 * width)
      >>> round(iso_flop_width(lambda width: 0.25 * dense(width), dense(1.0)), 2)
      2.0

    References:
      Saxena et al., [Sparse-IFT: Sparse iso-FLOP transformations for maximizing training
      efficiency](https://arxiv.org/abs/2303.11525), 2024: "sparse wide".
    """

    def fits(width: float) -> bool:
        return flops_of_width(width) <= target_flops

    if not fits(1.0):
        raise ValueError(
            f"target_flops={target_flops:g}: the sparse model costs {flops_of_width(1.0):g} FLOPs "
            "at a width of 1"
        )
    high = 2.0
    while fits(high):
        high *= 2
        if high > 1024:
            raise ValueError(
                f"target_flops={target_flops:g}: the sparse model costs no more at a width of 1,024"
            )
    return _largest(fits, high / 2, high, tolerance)


def _largest(fits: Callable[[float], bool], low: float, high: float, tolerance: float) -> float:
    """Returns the largest number that fits, between one that does and one that does not."""
    while high - low > tolerance:
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
