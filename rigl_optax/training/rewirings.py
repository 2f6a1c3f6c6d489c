"""When the masks of a run change, from the plan of its own transformation."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rigl_optax._plan import RewiringPlan
from rigl_optax.training.config import Config
from rigl_optax.training.methods import Method


class Rewirings(NamedTuple):
    """When the masks of a run change, and by how much.

    Attributes:
      plan: The plan of the transformation; None if the masks never change.
      grows_by_gradient: Whether growth needs the gradients of inactive weights.
      drops: Whether the method replaces a given fraction of the active weights.
      steps: Steps of the run.
      log_every: Steps between records of the training loss.
    """

    plan: RewiringPlan | None
    grows_by_gradient: bool
    drops: bool
    steps: int
    log_every: int

    @classmethod
    def of(cls, config: Config, method: Method, plan: RewiringPlan | None) -> "Rewirings":
        """Makes them from a config, its method and the plan of its transformation."""
        drops = plan is not None and "drop_fraction" in method.arguments(config)
        return cls(plan, method.grows_by_gradient, drops, config.steps, config.log.every)

    @property
    def happen(self) -> bool:
        """Whether the masks ever change."""
        return self.plan is not None

    def happen_at(self, step: int) -> bool:
        """Tells whether update number `step`, counted from 0, may change the masks."""
        return self.plan is not None and self.plan.rewires_at(step)

    def are_observed_at(self, step: int) -> bool:
        """Tells whether the masks before and after update `step` are compared.

        That is where they may have changed. If they change at every step, it is only done before
        records of the training loss.
        """
        if self.plan is not None and any(
            s.every == 1 and len(s.steps()) > 1 for s in self.plan.schedules
        ):
            return (step + 1) % self.log_every == 0 or step + 1 == self.steps
        return self.happen_at(step)

    def before(self, step: int) -> int:
        """Counts the rewirings that are scheduled before this step, so after `step` updates."""
        return 0 if self.plan is None else self.plan.rewirings_before(step)

    @property
    def growth_predicate(self) -> Callable[[jax.Array], jax.Array] | None:
        """Tells of a step (int32 scalar) whether its update grows weights by their gradient.

        None if no step does.
        """
        if self.plan is None or not self.grows_by_gradient:
            return None
        return self.plan.is_rewiring_step

    def drop_fractions(self, step: int, paths: Sequence[str]) -> dict[str, float]:
        """Returns the fractions of the active weights that a rewiring at this step replaces.

        Args:
          step: Update number, counted from 0.
          paths: Of the layers.

        Returns:
          `drop_fraction`, and `drop_fraction/path` of each layer that has another schedule of its
          own; nothing for a method that is given no drop fraction.
        """
        if self.plan is None or not self.drops:
            return {}
        plan = self.plan
        values = {"drop_fraction": float(plan.default.drop_fraction(jnp.int32(step)))}
        for path in paths:
            if (own := plan.of(path)) is not plan.default:
                values[f"drop_fraction/{path}"] = float(own.drop_fraction(jnp.int32(step)))
        return values
