"""Linear maps and convolutions whose kernel may be the stored blocks of a condensed one."""

from collections.abc import Collection, Sequence
from typing import Any, Protocol, TypeVar, cast, runtime_checkable

import jax
from flax import nnx
from jax import lax

from rigl_optax.condensed import CSR, BlockSparse, convolve
from rigl_optax.condensed._convolution import Padding
from rigl_optax.models.depthwise import depthwise

Kernel = TypeVar("Kernel", BlockSparse, CSR, BlockSparse | CSR)


@runtime_checkable
class TakesBlocks(Protocol):
    """A module that can multiply by stored blocks."""

    def kernels_of_blocks(self) -> dict[str, str]:
        """`{path within the module: why that kernel cannot be blocks, empty if it can}`."""


class Linear(nnx.Linear):
    """`nnx.Linear`; also with a `BlockSparse` or `CSR` in the place of its kernel."""

    def __call__(self, x: jax.Array, out_sharding: Any = None) -> jax.Array:
        """[..., in_features] to [..., out_features]."""
        kernel = self.kernel.get_value()
        if not isinstance(kernel, BlockSparse | CSR):
            return super().__call__(x, out_sharding)
        x, kernel = _in_dtype(x, kernel, self.dtype)
        y = x @ kernel
        return y if self.bias is None else y + self.bias[...].astype(y.dtype)

    def kernels_of_blocks(self) -> dict[str, str]:
        """As `refused` asks for it."""
        return {"kernel": ""}


class Conv(nnx.Conv):
    """`nnx.Conv` of images; also with a `BlockSparse` in the place of its kernel.

    It then takes what `models.convolution.conv` gives, one group of channels at that: no bias, no
    dilation. Where it is depthwise, it is quick on the CPU too.
    """

    def __call__(self, x: jax.Array, out_sharding: Any = None) -> jax.Array:
        """[batch, height, width, in_features] to [..., out_features]."""
        kernel = self.kernel.get_value()
        strides, padding = cast(Sequence[int], self.strides), cast(Padding, self.padding)
        if isinstance(kernel, BlockSparse):
            x, kernel = _in_dtype(x, kernel, self.dtype)
            return convolve(x, kernel, strides=strides, padding=padding)
        is_depthwise = 1 < self.feature_group_count == self.in_features == self.out_features
        if is_depthwise and self.bias is None:
            x, kernel = self.promote_dtype((x, kernel), dtype=self.dtype)
            window = kernel.shape[:2]
            if isinstance(padding, str):
                padding = lax.padtype_to_pads(x.shape[1:3], window, strides, padding)
            return depthwise(x, kernel, strides, padding)
        return super().__call__(x, out_sharding)

    def kernels_of_blocks(self) -> dict[str, str]:
        """As `refused` asks for it."""
        groups = self.feature_group_count
        return {"kernel": "" if groups == 1 else f"its channels are in {groups} groups"}


def refused(model: nnx.Module, kernels: Collection[str]) -> dict[str, str]:
    """Which of the kernels that are to be `BlockSparse` cannot be, and why.

    Modules answer for their own: `kernels_of_blocks` gives reasons by path within the module,
    empty where there is none. Of all others an array is expected.

    Args:
      model: Of arrays, or of their shapes.
      kernels: Paths of parameters.

    Returns:
      `{path: reason}`.

    Example:
      >>> model = nnx.eval_shape(lambda: nnx.List([Linear(4, 4, rngs=nnx.Rngs(0))]))
      >>> refused(model, ["0/kernel", "0/bias"])
      {'0/bias': 'its layer takes arrays alone'}
    """
    reasons = dict.fromkeys(kernels, "its layer takes arrays alone")
    for at, module in nnx.iter_modules(model):
        if isinstance(module, TakesBlocks):
            own = module.kernels_of_blocks()
            found = {"/".join(map(str, (*at, name))): why for name, why in own.items()}
            reasons |= {path: why for path, why in found.items() if path in reasons}
    return {path: why for path, why in reasons.items() if why}


def _in_dtype(x: jax.Array, kernel: Kernel, dtype: Any) -> tuple[jax.Array, Kernel]:
    """Both in the dtype of the computation."""
    if dtype is None:
        return x, kernel
    return x.astype(dtype), kernel.astype(dtype)
