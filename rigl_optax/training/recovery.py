"""Notices losses and weights that are not finite, and losses that leap; decides what to do."""

import math
import statistics
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from rigl_optax.training import metrics
from rigl_optax.training.config import Config
from rigl_optax.training.state import TrainState

POLICIES = ("stop", "skip", "rollback")
SPIKE = 3.0  # times the median of the records before
RECORDS = 10  # that the median is taken over
IN_A_ROW = 50  # steps skipped at once that end a run: nothing is learned any more


class NonFiniteError(Exception):
    """A loss or a weight is not finite.

    Attributes:
      step: Updates done when it was noticed.
      can_skip: Whether a run that goes back and skips such steps may come past it.
    """

    def __init__(self, message: str, step: int, *, can_skip: bool = True) -> None:
        super().__init__(message)
        self.step = step
        self.can_skip = can_skip


def check(state: TrainState) -> None:
    """Raises a NonFiniteError if a loss since the last record, or a weight, is not finite."""
    if not bool(_is_sound(state.sums.loss, state.params)):
        step = int(state.step)
        raise NonFiniteError(f"a loss or a weight is not finite, noticed after step {step}", step)


def check_goes_back(error: NonFiniteError, config: Config, records: metrics.Records) -> None:
    """Raises the error again if the run is not to go back to a checkpoint.

    That follows from the config and from records on disk alone, so that a run that was killed in
    between decides alike.
    """
    if config.faults.on_nonfinite != "rollback" or not error.can_skip:
        raise error
    times = metrics.times_gone_back(records, error.step)
    if times >= config.faults.max_rollbacks:
        raise NonFiniteError(
            f"{error}, after going back {times} times, the last time from step "
            f"{metrics.went_back_from(records, error.step)}; config.faults.max_rollbacks="
            f"{config.faults.max_rollbacks}",
            error.step,
        )


def check_evaluation(split: str, measured: Mapping[str, float], step: int) -> None:
    """Raises a NonFiniteError if what was measured on a split is not finite.

    Under every policy: the weights are finite, and no training step is to blame that could be
    skipped.
    """
    bad = [name for name, value in measured.items() if not math.isfinite(value)]
    if bad:
        raise NonFiniteError(
            f"the {split} {bad[0]} is {measured[bad[0]]} after step {step}, though all weights "
            "are finite",
            step,
            can_skip=False,
        )


def check_skipped(counts: Mapping[int, float], step: int, log_every: int) -> None:
    """Raises a NonFiniteError if too many steps in a row have been skipped.

    Args:
      counts: How many, by the step of the record that counts them.
      step: Of the record now.
      log_every: Steps between records.
    """
    row, at = 0.0, step
    while at > 0:
        since = (at - 1) // log_every * log_every
        if counts.get(at, 0) < at - since:
            break
        row, at = row + counts[at], since
    if row >= IN_A_ROW:
        raise NonFiniteError(
            f"the last {int(row)} steps up to step {step} were all skipped: their loss or "
            "gradients were not finite",
            step,
            can_skip=False,
        )


@jax.jit
def _is_sound(loss: jax.Array, params: object) -> jax.Array:
    return all_finite((loss, params))


def all_finite(tree: object) -> jax.Array:
    """Tells whether everything in a tree of floats and integers is finite: bool scalar."""
    checked = [jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree)]
    return jnp.all(jnp.stack(checked))


def spike(losses: Sequence[float]) -> str | None:
    """Warns if the last of the recorded losses leaps above those before.

    That is: above 3 times the median of the 10 records before it, once there are 10.
    """
    *before, last = losses
    if len(before) < RECORDS:
        return None
    usual = statistics.median(before[-RECORDS:])
    if last <= SPIKE * usual:
        return None
    return f"the training loss leapt to {last:.4g}, from {usual:.4g} (median of {RECORDS} records)"
