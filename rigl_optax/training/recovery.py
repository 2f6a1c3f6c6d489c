"""What is done about losses and weights that are not finite, and losses that leap."""

import statistics
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from rigl_optax.training.state import TrainState

POLICIES = ("stop", "skip", "rollback")
SPIKE = 3.0  # times the median of the records before
RECORDS = 10  # that the median is taken over


class NonFiniteError(Exception):
    """A loss or a weight is not finite.

    Attributes:
      step: Updates done when it was noticed.
    """

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message)
        self.step = step


def check_policy(name: str) -> None:
    """Raises a ValueError if there is no such policy."""
    if name not in POLICIES:
        raise ValueError(f"config.on_nonfinite={name!r}: must be one of {', '.join(POLICIES)}")


def check(state: TrainState) -> None:
    """Raises a NonFiniteError if a loss since the last record, or a weight, is not finite."""
    if not bool(_is_sound(state.sums.loss, state.params)):
        step = int(state.step)
        raise NonFiniteError(f"a loss or a weight is not finite, noticed after step {step}", step)


@jax.jit
def _is_sound(loss: jax.Array, params: object) -> jax.Array:
    return all_finite((loss, params))


def all_finite(tree: object) -> jax.Array:
    """Bool scalar: whether everything in a tree of floats and integers is finite."""
    checked = [jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree)]
    return jnp.all(jnp.stack(checked))


def spike(losses: Sequence[float]) -> str | None:
    """A warning if the last of the recorded losses leaps above those before.

    That is: above 3 times the median of the 10 records before it, once there are 10.
    """
    *before, last = losses
    if len(before) < RECORDS:
        return None
    usual = statistics.median(before[-RECORDS:])
    if last <= SPIKE * usual:
        return None
    return f"the training loss leapt to {last:.4g}, from {usual:.4g} (median of {RECORDS} records)"
