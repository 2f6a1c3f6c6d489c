"""When each layer is rewired and how much of it, from one schedule and exceptions to it."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rigl_optax import _paths, _schedules
from rigl_optax._layout import SparseLeaf
from rigl_optax._ranking._packing import Packing
from rigl_optax._schedules import RewiringSchedule

_KEYS = ("begin", "end", "every", "drop_fraction")


class LayerPlan(NamedTuple):
    """When a layer is rewired, and the fraction of its active weights that is replaced."""

    schedule: RewiringSchedule
    drop_fraction: optax.Schedule


class RewiringPlan(NamedTuple):
    """The plan of most layers, and by pattern those of others.

    `window` is the number of calls up to a rewiring whose dense gradients decide on growth.
    """

    default: LayerPlan
    overrides: tuple[tuple[str, LayerPlan], ...] = ()
    window: int = 1

    @property
    def schedules(self) -> list[RewiringSchedule]:
        """Lists the default schedule, then those of the overrides."""
        return [self.default.schedule, *(plan.schedule for _, plan in self.overrides)]

    def rewires_at(self, count: int) -> bool:
        """Tells what `is_rewiring_step` tells, of a Python integer and without JAX."""
        return any(count in schedule.steps() for schedule in self.schedules)

    def rewirings_before(self, count: int) -> int:
        """Counts the calls that rewire any layer, among the first `count`."""
        return len(self.steps_before(count))

    def dense_gradients_before(self, count: int) -> int:
        """Counts the calls, among the first `count`, whose dense gradients decide on growth."""
        if self.window == 1:
            return self.rewirings_before(count)
        steps = np.asarray(self.steps_before(count + self.window - 1), np.int64)
        ends = np.minimum(steps + 1, count)
        # The windows of layers with schedules of their own may overlap: a call counts once.
        begins = np.maximum(steps - self.window + 1, np.concatenate([[0], ends[:-1]])[: len(ends)])
        return int(np.maximum(ends - begins, 0).sum())

    def of(self, path: str) -> LayerPlan:
        """Returns the plan of the layer at this path."""
        index = self._override_of(path)
        return self.default if index < 0 else self.overrides[index][1]

    def steps_before(self, count: int) -> Sequence[int] | np.ndarray:
        """Lists the counts below `count` at which any layer is rewired, ascending."""
        each = [schedule.steps()[: _length(schedule, count)] for schedule in self.schedules]
        if len(each) == 1:
            return each[0]
        return np.unique(np.concatenate([np.arange(s.start, s.stop, s.step) for s in each]))

    def is_rewiring_step(self, count: jax.Array) -> jax.Array:
        """Tells whether the call with this `count` rewires any layer: a bool scalar."""
        due = self.default.schedule.is_rewiring_step(count)
        for _, plan in self.overrides:
            due = due | plan.schedule.is_rewiring_step(count)
        return due

    def fractions(
        self, count: jax.Array, leaves: Sequence[SparseLeaf], packing: Packing
    ) -> jax.Array:
        """Evaluates the drop fractions: a scalar, or float32 [rankings] with overrides."""
        return self.fractions_of(count, leaves, packing.rankings_per_leaf)

    def fractions_of(
        self, count: jax.Array, leaves: Sequence[SparseLeaf], numbers: Sequence[int]
    ) -> jax.Array:
        """Evaluates the drop fractions, with so many entries for each leaf."""
        if not self.overrides:
            return self.default.drop_fraction(count)
        plans = [self.default, *(plan for _, plan in self.overrides)]
        each = jnp.stack(
            [
                jnp.where(
                    plan.schedule.is_rewiring_step(count),
                    jnp.asarray(plan.drop_fraction(count), jnp.float32),
                    jnp.float32(0),
                )
                for plan in plans
            ]
        )
        return self._of_leaves(each, leaves, numbers)

    def are_due(
        self, count: jax.Array, leaves: Sequence[SparseLeaf], packing: Packing
    ) -> jax.Array | None:
        """Tells which layers are rewired, bool [rankings]; None for all, as without overrides."""
        if not self.overrides:
            return None
        plans = [self.default, *(plan for _, plan in self.overrides)]
        each = jnp.stack([plan.schedule.is_rewiring_step(count) for plan in plans])
        return self._of_leaves(each, leaves, packing.rankings_per_leaf)

    def check(self, paths: Sequence[str]) -> None:
        """Raises a ValueError if a pattern matches no sparse leaf, or two match one."""
        _paths.pattern_of_each([pattern for pattern, _ in self.overrides], paths, "overrides")

    def _of_leaves(
        self, each: jax.Array, leaves: Sequence[SparseLeaf], numbers: Sequence[int]
    ) -> jax.Array:
        """Takes for each leaf the entry of its plan, so many times."""
        of_leaf = np.asarray([1 + self._override_of(leaf.path) for leaf in leaves])
        return each[jnp.asarray(np.repeat(of_leaf, numbers))]

    def _override_of(self, path: str) -> int:
        """Finds which override a leaf has; -1 for none."""
        for i, (pattern, _) in enumerate(self.overrides):
            if re.search(pattern, path):
                return i
        return -1


def rewiring_plan(
    *,
    begin: int,
    end: int,
    every: int,
    drop_fraction: float | optax.Schedule = 0.0,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
) -> RewiringPlan:
    """Makes a plan, for `Method`, and checks it.

    Args:
      begin: Count of the first rewiring.
      end: No rewiring at `count >= end`.
      every: Steps between rewirings.
      drop_fraction: A number is the start of a cosine that reaches 0 at `end`.
      overrides: `{pattern: {"begin", "end", "every", "drop_fraction": ...}}`, for the layers
        whose path the regular expression is found in; what is not given is as for the others.

    Raises:
      TypeError, ValueError: As `rewiring_schedule` and the drop-fraction schedules do; on a
        key that does not exist.
    """
    given: dict[str, Any] = {
        "begin": begin,
        "end": end,
        "every": every,
        "drop_fraction": drop_fraction,
    }
    plans = []
    for pattern, changes in (overrides or {}).items():
        _paths.compile_pattern(pattern, "overrides")
        unknown = sorted(set(changes) - set(_KEYS))
        if unknown:
            raise ValueError(
                f"overrides[{pattern!r}]: unknown {_paths.listing(unknown)}; may have "
                f"{_paths.listing(_KEYS)}"
            )
        plans.append((pattern, _layer_plan(**(given | dict(changes)))))
    return RewiringPlan(_layer_plan(**given), tuple(plans))


def _layer_plan(
    begin: int, end: int, every: int, drop_fraction: float | optax.Schedule
) -> LayerPlan:
    schedule = _schedules.rewiring_schedule(begin=begin, end=end, every=every)
    return LayerPlan(schedule, _schedules.as_drop_fraction(drop_fraction, schedule))


def _length(schedule: RewiringSchedule, count: int) -> int:
    """Counts the steps of a schedule before `count`."""
    return len(range(schedule.begin, min(schedule.end, count), schedule.every))
