"""What models ask of a condensed kernel: `x @ kernel`, `kernel @ x`, `kernel.T`, and a few more."""

import abc
from typing import Self

import jax
import jax.numpy as jnp


class Kernel(abc.ABC):
    """Stored values and their topology, in place of a dense kernel: `BlockSparse` or `CSR`."""

    # NumPy would otherwise take `array @ kernel` for a product with an array of objects.
    __array_priority__ = 1000

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Shape of the dense kernel."""

    @property
    @abc.abstractmethod
    def T(self) -> Self:
        """The transposed kernel."""

    @abc.abstractmethod
    def __rmatmul__(self, x: jax.Array) -> jax.Array:
        """Multiplies activations, [..., in] to [..., out]."""

    @abc.abstractmethod
    def astype(self, dtype: jax.typing.DTypeLike) -> Self:
        """Returns the kernel with values of another dtype."""

    @abc.abstractmethod
    def dense(self) -> jax.Array:
        """Returns the dense kernel, zero where nothing is stored."""

    def __matmul__(self, x: jax.Array) -> jax.Array:
        """Multiplies [out], or [..., out, columns], from the left, as `@` does with arrays."""
        x = jnp.asarray(x)
        if not x.ndim or x.shape[max(0, x.ndim - 2)] != self.shape[-1]:
            raise ValueError(f"a kernel of {self.shape} does not fit an array of shape {x.shape}")
        if x.ndim == 1:
            return x @ self.T
        return (x.swapaxes(-1, -2) @ self.T).swapaxes(-1, -2)
