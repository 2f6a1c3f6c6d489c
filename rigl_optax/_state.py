"""Defines the state that all sparse transformations share."""

from typing import NamedTuple

import jax
import numpy as np

from rigl_optax._types import PyTree


class Memory(NamedTuple):
    """Values that a method keeps between calls; a part it does not need is an empty tuple.

    Trees have the structure of params, with `optax.MaskedNode()` for dense leaves.

    Attributes:
      gradients: float32 tree: an average or a sum of dense gradients.
      second_masks: Bool tree: a second mask, with a meaning that the method defines.
      initial: Tree of the weights at init.
      numbers: A few numbers, such as a threshold.
      snapshot: Tree of all parameters, dense leaves too, as they were at one call.
    """

    gradients: PyTree = ()
    second_masks: PyTree = ()
    initial: PyTree = ()
    numbers: PyTree = ()
    snapshot: PyTree = ()


class SparseState(NamedTuple):
    """State of a sparse transformation.

    Attributes:
      count: int32 scalar: calls of `update` so far.
      masks: Tree of the structure of params; bool arrays of the shape and sharding of
        their parameters, True where a weight is active; all True for dense leaves.
      inner_state: State of the wrapped optimizer.
      rewirings: int32 scalar: rewirings so far.
      healed: int32 scalar: inactive weights found non-zero at rewirings. It stays 0 unless
        something outside writes into them (a dense checkpoint, an average, a
        transformation after ours).
      memory: Values that the method keeps between calls.
      shadow: Tree of the structure of params, with `optax.MaskedNode()` for dense leaves: the
        weights of a method that go on learning while they are inactive. Else empty.
      uninformed: int32 scalar: how often a layer kept its mask at a rewiring because all growth
        scores outside its kept weights were 0, as if something had zeroed the gradients.
    """

    count: jax.Array  # type: ignore[assignment]
    masks: PyTree
    inner_state: PyTree
    rewirings: jax.Array
    healed: jax.Array
    memory: Memory = Memory()
    shadow: PyTree = ()
    uninformed: jax.typing.ArrayLike = np.int32(0)
