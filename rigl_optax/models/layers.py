"""Linear maps and convolutions whose kernel may be the stored blocks of a condensed one."""

from collections.abc import Collection, Sequence
from typing import Any, Protocol, TypeVar, runtime_checkable

import jax
from flax import nnx
from jax import lax

from rigl_optax.condensed import CSR, BlockSparse, convolve
from rigl_optax.condensed.blocks._convolution import Padding
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

    Blocks are for one group of channels, no dilation, and zeros as padding; `kernels_of_blocks`
    says what is in the way. Where it is depthwise and plain, it is quick on the CPU too.
    """

    def __call__(self, x: jax.Array, out_sharding: Any = None) -> jax.Array:
        """[batch, height, width, in_features] to [..., out_features]."""
        kernel = self.kernel.get_value()
        strides = _each(self.strides)
        if isinstance(kernel, BlockSparse):
            if reason := self.kernels_of_blocks()["kernel"]:
                raise ValueError(f"the kernel of this convolution cannot be blocks: {reason}")
            x, kernel = _in_dtype(x, kernel, self.dtype)
            y = convolve(x, kernel, strides=strides, padding=self._pads())
            return y if self.bias is None else y + self.bias[...].astype(y.dtype)
        is_depthwise = 1 < self.feature_group_count == self.in_features == self.out_features
        if (
            not is_depthwise
            or x.ndim != 4
            or out_sharding
            or self._special()
            or self.mask is not None
        ):
            return super().__call__(x, out_sharding)
        bias = None if self.bias is None else self.bias[...]
        x, kernel, bias = self.promote_dtype((x, kernel, bias), dtype=self.dtype)
        padding = self._pads()
        if isinstance(padding, str):
            padding = lax.padtype_to_pads(x.shape[1:3], kernel.shape[:2], strides, padding)
        y = depthwise(x, kernel, strides, padding)
        return y if bias is None else y + bias

    def _pads(self) -> Padding:
        """The padding in one of the forms that `lax` takes, of two dimensions."""
        if isinstance(self.padding, str):
            return self.padding
        sides = [self.padding] * 2 if isinstance(self.padding, int) else list(self.padding)
        pairs = [(side, side) if isinstance(side, int) else side for side in sides]
        return [(low, high) for low, high in pairs]

    def _special(self) -> str:
        """What makes it more than a plain convolution of images; empty if nothing does."""
        if len(self.kernel_size) != 2:
            return f"its window has {len(self.kernel_size)} dimensions, not two"
        for name in ("kernel_dilation", "input_dilation"):
            if _each(getattr(self, name)) != (1, 1):
                return f"its {name} is {getattr(self, name)}"
        if isinstance(self.padding, str) and self.padding not in ("SAME", "VALID"):
            return f"its padding is {self.padding!r}"
        for name in ("precision", "preferred_element_type"):
            if getattr(self, name) is not None:
                return f"its {name} is {getattr(self, name)}"
        if self.conv_general_dilated is not lax.conv_general_dilated:
            return "it has a conv_general_dilated of its own"
        return ""

    def kernels_of_blocks(self) -> dict[str, str]:
        """As `refused` asks for it."""
        groups = self.feature_group_count
        masked = "it has a mask" if self.mask is not None else ""
        reason = (
            f"its channels are in {groups} groups" if groups != 1 else self._special() or masked
        )
        return {"kernel": reason}


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


def _each(of: int | Sequence[int] | None) -> tuple[int, ...]:
    """Strides or dilations along height and width, from one of the forms that Flax takes."""
    return (of or 1,) * 2 if of is None or isinstance(of, int) else tuple(of)


def _in_dtype(x: jax.Array, kernel: Kernel, dtype: Any) -> tuple[jax.Array, Kernel]:
    """Both in the dtype of the computation."""
    if dtype is None:
        return x, kernel
    return x.astype(dtype), kernel.astype(dtype)
