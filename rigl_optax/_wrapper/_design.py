"""An Optax transformation that also says what it is going to do."""

from collections.abc import Callable
from typing import Any, NamedTuple

import optax

from rigl_optax._layout import Layout
from rigl_optax._plan import RewiringPlan
from rigl_optax._types import LayerSparsities, PyTree, Seed
from rigl_optax._wrapper._method import Method


class Layouts(NamedTuple):
    """Which leaves are sparse and how many groups of each are inactive, before any mask is made.

    Attributes:
      first: At `init`, unless there are initial masks.
      final: When training ends; the same leaves. Of most methods the same numbers.
    """

    first: Layout
    final: Layout


class Design(NamedTuple):
    """What a sparse transformation was built from; `init` and `update` go by it.

    Attributes:
      method: What distinguishes it from others.
      distribution: The sparsities of the layers, by path: `distribution(params)`.
      layouts: `layouts(params) -> Layouts`; raises what `init` raises for these params.
      initial_masks: As they were given, or None.
      seed: As it was given.
    """

    method: Method
    distribution: LayerSparsities
    layouts: Callable[[PyTree], Layouts]
    initial_masks: PyTree | None
    seed: Seed

    @property
    def plan(self) -> RewiringPlan | None:
        """Returns when it rewires; None for never. Nothing else decides that."""
        return self.method.plan


class SparseTransformation(optax.GradientTransformationExtraArgs):
    """An Optax transformation with the `design` it was built from.

    To Optax it is a pair of functions like any other. What wraps it, as `optax.chain` does,
    returns a transformation without a design.
    """

    design: Design

    @classmethod
    def of(cls, init: Any, update: Any, design: Design) -> "SparseTransformation":
        """Makes a transformation of these two functions."""
        made = cls(init, update)
        made.design = design
        return made


def design_of(tx: Any) -> Design | None:
    """Returns the design of a transformation; None if it has none, as a plain optimizer."""
    return getattr(tx, "design", None)
