"""Linear maps and convolutions whose kernel may be the stored blocks of a condensed one."""

from collections.abc import Sequence
from typing import Any, cast

import jax
from flax import nnx
from jax import lax

from rigl_optax.condensed import BlockSparse, convolve
from rigl_optax.condensed._convolution import Padding
from rigl_optax.models.depthwise import depthwise


class Linear(nnx.Linear):
    """`nnx.Linear`; also with a `BlockSparse` in the place of its kernel."""

    def __call__(self, x: jax.Array, out_sharding: Any = None) -> jax.Array:
        """[..., in_features] to [..., out_features]."""
        kernel = self.kernel.get_value()
        if not isinstance(kernel, BlockSparse):
            return super().__call__(x, out_sharding)
        x, kernel = _in_dtype(x, kernel, self.dtype)
        y = x @ kernel
        return y if self.bias is None else y + self.bias[...].astype(y.dtype)


class Conv(nnx.Conv):
    """`nnx.Conv` of images without bias; also with a `BlockSparse` in the place of its kernel.

    Where it is depthwise, it is quick on the CPU too.
    """

    def __call__(self, x: jax.Array, out_sharding: Any = None) -> jax.Array:
        """[batch, height, width, in_features] to [..., out_features]."""
        kernel = self.kernel.get_value()
        # Of what Flax takes, `models.convolution.conv` gives these kinds alone.
        strides, padding = cast(Sequence[int], self.strides), cast(Padding, self.padding)
        if isinstance(kernel, BlockSparse):
            if self.feature_group_count != 1:
                raise ValueError(f"{self.feature_group_count} groups of channels: keep it dense")
            x, kernel = _in_dtype(x, kernel, self.dtype)
            return convolve(x, kernel, strides=strides, padding=padding)
        if 1 < self.feature_group_count == self.in_features == self.out_features:
            x, kernel = self.promote_dtype((x, kernel), dtype=self.dtype)
            window = kernel.shape[:2]
            if isinstance(padding, str):
                padding = lax.padtype_to_pads(x.shape[1:3], window, strides, padding)
            return depthwise(x, kernel, strides, padding)
        return super().__call__(x, out_sharding)


def _in_dtype(x: jax.Array, kernel: BlockSparse, dtype: Any) -> tuple[jax.Array, BlockSparse]:
    """Both in the dtype of the computation."""
    if dtype is None:
        return x, kernel
    return x.astype(dtype), kernel.astype(dtype)
