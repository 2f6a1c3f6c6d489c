"""The state of every sparse transformation."""

from typing import Any, NamedTuple

import jax

PyTree = Any


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
    """

    count: jax.Array  # type: ignore[assignment]
    masks: PyTree
    inner_state: PyTree
    rewirings: jax.Array
    healed: jax.Array
