"""Defines a dropout whose state is two plain arrays, saved and resumed like all others."""

import jax
import jax.numpy as jnp
from flax import nnx


class DropoutState(nnx.Variable[jax.Array]):
    """Key data, or the number of calls: state that is no parameter."""


class Dropout(nnx.Module):
    """Zeros a random fraction of its input in training, and scales up the rest.

    The mask is a function of the key and the number of calls before, so a resumed run draws the
    same masks as one that was not stopped.

    Args:
      rate: Fraction that is zeroed, in [0, 1).
      rngs: Random keys (stream `dropout`).

    Raises:
      ValueError: If the rate is not in [0, 1).

    Examples:
      >>> from flax import nnx
      >>> import jax.numpy as jnp
      >>> dropout = Dropout(0.5, rngs=nnx.Rngs(0))
      >>> sorted(set(dropout(jnp.ones(100)).tolist()))
      [0.0, 2.0]
      >>> dropout.eval()
      >>> set(dropout(jnp.ones(100)).tolist())
      {1.0}
    """

    def __init__(self, rate: float, *, rngs: nnx.Rngs) -> None:
        if not 0 <= rate < 1:
            raise ValueError(f"dropout={rate}: must be in [0, 1)")
        self.rate = rate
        self.deterministic = False  # set by `train` and `eval`
        self.key = DropoutState(jax.random.key_data(rngs.dropout()))
        self.calls = DropoutState(jnp.zeros((), jnp.int32))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns `x` with random elements zeroed and the others divided by `1 - rate`."""
        if self.deterministic or not self.rate:
            return x
        key = jax.random.fold_in(jax.random.wrap_key_data(self.key[...]), self.calls[...])
        self.calls[...] = self.calls[...] + 1
        kept = jax.random.bernoulli(key, 1 - self.rate, x.shape)
        return jnp.where(kept, x / (1 - self.rate), 0).astype(x.dtype)
