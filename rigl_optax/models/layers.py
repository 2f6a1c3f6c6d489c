"""Defines linear layers and convolutions whose kernel may be stored as blocks (`condensed`)."""

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
    """A module whose kernels may be `BlockSparse`."""

    def kernels_of_blocks(self) -> dict[str, str]:
        """Returns `{path within the module: reason}`; an empty reason says blocks are possible."""


class Linear(nnx.Linear):
    """An `nnx.Linear` whose kernel may also be a `BlockSparse` or `CSR`."""

    def __call__(self, x: jax.Array, out_sharding: Any = None) -> jax.Array:
        """Maps [..., in_features] to [..., out_features]."""
        kernel = self.kernel.get_value()
        if not isinstance(kernel, BlockSparse | CSR):
            return super().__call__(x, out_sharding)
        x, kernel = _in_dtype(x, kernel, self.dtype)
        y = x @ kernel
        return y if self.bias is None else y + self.bias[...].astype(y.dtype)

    def kernels_of_blocks(self) -> dict[str, str]:
        """Returns that the kernel may be blocks; see `TakesBlocks`."""
        return {"kernel": ""}


class Conv(nnx.Conv):
    """An `nnx.Conv` of images whose kernel may also be a `BlockSparse`.

    Blocks need one group of channels, no dilation, and padding with zeros; `kernels_of_blocks`
    says what prevents them. A depthwise convolution without other options runs fast on the CPU,
    too (`models.depthwise`).
    """

    def __call__(self, x: jax.Array, out_sharding: Any = None) -> jax.Array:
        """Maps [batch, height, width, in_features] to [batch, height, width, out_features]."""
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
            or self._special_option()
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
        """Returns the padding of two dimensions in one of the forms that `lax` takes."""
        if isinstance(self.padding, str):
            return self.padding
        sides = [self.padding] * 2 if isinstance(self.padding, int) else list(self.padding)
        pairs = [(side, side) if isinstance(side, int) else side for side in sides]
        return [(low, high) for low, high in pairs]

    def _special_option(self) -> str:
        """Names an option beyond a plain convolution of images; empty if there is none."""
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
        """Says whether the kernel may be blocks; see `TakesBlocks`."""
        groups = self.feature_group_count
        masked = "it has a mask" if self.mask is not None else ""
        reason = (
            f"its channels are in {groups} groups"
            if groups != 1
            else self._special_option() or masked
        )
        return {"kernel": reason}


def refused(model: nnx.Module, kernels: Collection[str]) -> dict[str, str]:
    """Finds kernels that cannot be `BlockSparse`, and says why.

    Modules that define `kernels_of_blocks` (see `TakesBlocks`) decide for their own kernels. All
    other parameters must stay arrays.

    Args:
      model: A model of arrays, or of their shapes.
      kernels: Paths of the parameters to store as `BlockSparse`.

    Returns:
      `{path: reason}` of those that cannot be.

    Examples:
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


def has_probes(module: nnx.Module) -> bool:
    """Returns whether the gradient of a kernel of the module is asked to score its blocks."""
    kernels = jax.tree.leaves(
        nnx.to_pure_dict(nnx.state(module, nnx.Param)), is_leaf=lambda x: isinstance(x, BlockSparse)
    )
    return any(isinstance(x, BlockSparse) and x.probe is not None for x in kernels)


def _each(of: int | Sequence[int] | None) -> tuple[int, ...]:
    """Returns strides or dilations along height and width, from any form that Flax takes."""
    return (of or 1,) * 2 if of is None or isinstance(of, int) else tuple(of)


def _in_dtype(x: jax.Array, kernel: Kernel, dtype: Any) -> tuple[jax.Array, Kernel]:
    """Casts both to the dtype of the computation."""
    if dtype is None:
        return x, kernel
    return x.astype(dtype), kernel.astype(dtype)
