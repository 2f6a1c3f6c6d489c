"""Finds the dense network that takes as many bytes as a sparse one."""

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
    while high - low > tolerance:
        middle = (low + high) / 2
        low, high = (middle, high) if size(middle) <= target_bytes else (low, middle)
    return low
