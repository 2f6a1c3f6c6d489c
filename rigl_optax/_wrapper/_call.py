"""One call of `update`, unpacked, and what comes of it."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from rigl_optax._layout import Layout
from rigl_optax._state import SparseState
from rigl_optax._types import PyTree
from rigl_optax._wrapper import _memory
from rigl_optax._wrapper._inner_state import Kept
from rigl_optax._wrapper._rewiring import LeafInputs, Rewired

Leaves: TypeAlias = list[Any]


class Call(NamedTuple):
    """What `update` was given; lists have an entry for every leaf of params.

    Attributes:
      layout: Of the parameters.
      weights: The parameters.
      gradients: Dense.
      masks: Until now.
      state: Until now.
      is_rewiring: Bool scalar; None if no call ever is.
      inner: `inner(gradients, weights) -> (steps, new inner state)`.
      at_rest: `at_rest(weights) -> fresh inner state`.
    """

    layout: Layout
    weights: Leaves
    gradients: Leaves
    masks: Leaves
    state: SparseState
    is_rewiring: jax.Array | None
    inner: Callable[[Leaves, Leaves], tuple[Leaves, PyTree]]
    at_rest: Callable[[Leaves], PyTree]

    def leaf_inputs(self, ranked: Leaves, **more: Any) -> LeafInputs:
        """Collects what a rewiring sees when it ranks these weights."""
        select = self.layout.select
        return LeafInputs(
            count=self.state.count,
            weights=select(ranked),
            gradients=select(self.gradients),
            masks=select(self.masks),
            second_masks=_memory.leaves(self.state.memory.second_masks),
            numbers=self.state.memory.numbers,
            **more,
        )

    def kept(self, rewired: Rewired | None) -> list[Kept | None]:
        """Pairs the old and the new mask of each leaf; None for dense leaves."""
        kept: list[Kept | None] = [None] * len(self.weights)
        for i, leaf in enumerate(self.layout.sparse):
            mask = self.masks[leaf.position]
            pair = (mask, mask) if rewired is None else (rewired.before[i], rewired.masks[i])
            kept[leaf.position] = Kept(*pair)
        return kept


class Step(NamedTuple):
    """What comes of a call; lists of leaves.

    Attributes:
      updates: Of all leaves.
      inner_state: To be stored.
      rewired: None if no call ever rewires.
      remembered: What the method remembers of the gradients of sparse leaves, if it does.
      shadow: Of sparse leaves, if the method has one.
    """

    updates: Leaves
    inner_state: PyTree
    rewired: Rewired | None
    remembered: Leaves | None = None
    shadow: Leaves | None = None


def step_dtype(step: jax.Array, weight: jax.Array) -> Any:
    """Returns the dtype of an update: it holds `-weight` exactly."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(step, weight)
