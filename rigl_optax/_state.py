"""The state of every sparse transformation."""

from typing import NamedTuple

import jax
import numpy as np

from rigl_optax._types import PyTree


class Memory(NamedTuple):
    """What some methods remember between calls; empty tuples for those that don't.

    Trees have the structure of params, with `optax.MaskedNode()` for dense leaves.

    Attributes:
      gradients: float32 tree: an average or a sum of dense gradients.
      second_masks: Bool tree: Top-KAST's backward set, DeepR's signs.
      initial: Tree of the weights at init.
      numbers: A few numbers: DSR's threshold, STR's thresholds.
    """

    gradients: PyTree = ()
    second_masks: PyTree = ()
    initial: PyTree = ()
    numbers: PyTree = ()


class SparseState(NamedTuple):
    """State of a sparse transformation.

    Attributes:
      count: int32 scalar: calls of `update` so far.
      masks: Tree of the structure of params; bool arrays of the shape and sharding of
        their parameters, True where a weight is active. All True for dense leaves.
      inner_state: State of the wrapped optimizer.
      rewirings: int32 scalar: rewirings so far.
      healed: int32 scalar: inactive weights found non-zero at rewirings. 0 unless
        something outside writes into them (a dense checkpoint, an average, a
        transformation after ours).
      memory: What the method remembers between calls.
      shadow: Tree of the structure of params, of a method whose weights live on while
        inactive: those weights, with `optax.MaskedNode()` for dense leaves. Else empty.
      uninformed: int32 scalar: how often a layer kept its mask at a rewiring because all scores
        outside what it would have kept were 0, as of gradients that something has zeroed.
    """

    count: jax.Array  # type: ignore[assignment]
    masks: PyTree
    inner_state: PyTree
    rewirings: jax.Array
    healed: jax.Array
    memory: Memory = Memory()
    shadow: PyTree = ()
    uninformed: jax.typing.ArrayLike = np.int32(0)
