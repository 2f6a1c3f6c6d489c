"""Dropout whose state is two plain arrays, so that it is saved and resumed with the rest."""

import jax
import jax.numpy as jnp
from flax import nnx


class DropoutState(nnx.Variable[jax.Array]):
    """Key data, or how many times something was dropped; no parameter."""


class Dropout(nnx.Module):
    """Zeros a fraction of its input in training, and scales up the rest.

    What is zeroed is a function of the key and of the calls before: a run that is resumed goes on
    as it would have.

    Args:
      rate: The fraction.
      rngs: Random keys (stream `dropout`).

    Example:
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
        """`x` with some of its elements zeroed."""
        if self.deterministic or not self.rate:
            return x
        key = jax.random.fold_in(jax.random.wrap_key_data(self.key[...]), self.calls[...])
        self.calls[...] = self.calls[...] + 1
        kept = jax.random.bernoulli(key, 1 - self.rate, x.shape)
        return jnp.where(kept, x / (1 - self.rate), 0).astype(x.dtype)
