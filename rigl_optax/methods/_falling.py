"""Numbers of active weights that fall on a curve from the first masks to the final ones."""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from rigl_optax import _layout, _masks, _numbers
from rigl_optax._ranking import _keep_and_grow, _top_k
from rigl_optax._ranking._packing import Packing, RankingIds
from rigl_optax._types import Arrays, PyTree, Sparsity
from rigl_optax._wrapper._method import InitialMemory, RewiringInputs

Scope = Literal["layer", "global"]
_BITS = 15  # products of two numbers of so many bits fit into int32


def active_counts(steps: range, power: float) -> Callable[[RewiringInputs], jax.Array]:
    """Returns `active_counts(inputs) -> int32 [rankings]`: how many weights stay active.

    Args:
      steps: Counts of the rewirings.
      power: p.

    Raises:
      ValueError: If `power` is not above 0.
    """
    power = _numbers.real("power", power)
    if not power > 0:
        raise ValueError(f"power={power}: must be above 0")
    first, last = steps[0], steps[-1]

    def active_counts(inputs: RewiringInputs) -> jax.Array:
        packing = inputs.packing
        final = final_zeros(inputs)
        sizes = jnp.asarray(packing.sizes())
        zeros_at_start = sizes - inputs.numbers
        to_go = jnp.asarray(final) - zeros_at_start
        left = jnp.float32(last) - inputs.count.astype(jnp.float32)
        gone = 1 - _power(left / jnp.float32(max(last - first, 1)), power)
        zeros = zeros_at_start + jnp.floor(to_go.astype(jnp.float32) * gone).astype(jnp.int32)
        # float32 does not hold large numbers exactly, so the last rewiring takes the final ones.
        zeros = jnp.where(inputs.count >= last, final, jnp.minimum(zeros, final))
        return sizes - zeros

    return active_counts


def linear_active_counts(steps: range) -> Callable[[RewiringInputs], jax.Array]:
    """Returns `active_counts(inputs) -> int32 [rankings]` of a straight line.

    In integers, since a line crosses whole numbers so often that the rounding of floats would show:
    the way gone is rounded down to a multiple of 1 / 32,768.

    Args:
      steps: Counts of the rewirings.
    """
    first, length = steps[0], max(steps[-1] - steps[0], 1)
    shift = max(length.bit_length() - _BITS, 0)

    def active_counts(inputs: RewiringInputs) -> jax.Array:
        done = jnp.clip(inputs.count - first, 0, length) >> shift
        gone = (done << _BITS) // (length >> shift)
        return _active(inputs, jnp.where(inputs.count >= steps[-1], 1 << _BITS, gone))

    return active_counts


def sigmoid_active_counts(steps: range, steepness: float) -> Callable[[RewiringInputs], jax.Array]:
    """Returns `active_counts(inputs) -> int32 [rankings]` of `sigmoid_progress`.

    The way gone is rounded to a multiple of 1 / 32,768.

    Args:
      steps: Counts of the rewirings.
      steepness: As in `sigmoid_progress`.
    """
    way = sigmoid_progress(steps, steepness)
    table = np.asarray([round(way(t) * (1 << _BITS)) for t in steps], np.int32)

    def active_counts(inputs: RewiringInputs) -> jax.Array:
        index = jnp.clip((inputs.count - steps.start) // steps.step, 0, len(steps) - 1)
        return _active(inputs, jnp.asarray(table)[index])

    return active_counts


def _active(inputs: RewiringInputs, gone: jax.Array) -> jax.Array:
    """Returns the numbers of active weights after `gone` / 32,768 of the way."""
    sizes = jnp.asarray(inputs.packing.sizes())
    at_start = sizes - inputs.numbers
    to_go = jnp.asarray(final_zeros(inputs)) - at_start
    whole, rest = to_go >> _BITS, to_go & ((1 << _BITS) - 1)
    return sizes - (at_start + whole * gone + (rest * gone >> _BITS))


def final_zeros(inputs: RewiringInputs) -> np.ndarray:
    """Returns the numbers of inactive groups when training ends, int32 [rankings]."""
    return np.repeat(
        [leaf.zeros for leaf in inputs.leaves], inputs.packing.rankings_per_leaf
    ).astype(np.int32)


def pruning(steps: range, power: float, scope: Scope) -> Callable[[RewiringInputs], Arrays]:
    """Returns `prune(inputs) -> masks`, which prunes to the numbers of the schedule.

    Args:
      steps: Counts of the rewirings.
      power: p.
      scope: `layer` or `global`.

    Raises:
      ValueError: If `power` is not above 0, or the scope is unknown.
    """
    active_at = active_counts(steps, power)
    check_scope(scope)

    def prune(inputs: RewiringInputs) -> Arrays:
        scores = _keep_and_grow.drop_scores(inputs.weights, inputs.masks)
        return largest(inputs, scores, active_at(inputs), scope)

    return prune


def check_scope(scope: str) -> None:
    """Raises a ValueError if there is no such scope."""
    if scope not in get_args(Scope):
        raise ValueError(f"scope={scope!r}: must be one of {', '.join(get_args(Scope))}")


def largest(inputs: RewiringInputs, scores: Arrays, keep: jax.Array, scope: Scope) -> Arrays:
    """Returns masks of the largest scores: of each layer, or of all layers together.

    Args:
      inputs: Of the rewiring.
      scores: int32, laid out as its weights; -1 for what cannot be active.
      keep: int32 [rankings]: how many of each layer; with the scope `global` their sum counts.
      scope: `layer` or `global`.
    """
    packing, ranking_ids = inputs.packing, inputs.packing.ranking_ids
    if scope == "global":
        # One ranking of all layers; its number is the sum of theirs.
        ranking_ids, keep = packing.one_ranking(), jnp.sum(keep, keepdims=True, dtype=jnp.int32)
    # What is inactive cannot be kept: traced initial masks, which `init` cannot check, may have
    # more zeros than the schedule.
    keep = jnp.minimum(keep, _top_k.counts([s >= 0 for s in scores], ranking_ids))
    if scope == "global":
        scores = _largest_first(scores, packing.ranking_ids)
    return _top_k.top_k(scores, ranking_ids, packing.per_row(keep))


def progress(steps: range, power: float) -> Callable[[int], float]:
    """Returns `progress(count)`, the share of the way from the first to the final numbers.

    `explain` and the accounting of FLOPs use it; the masks do not.
    """
    length = max(steps[-1] - steps[0], 1)
    return lambda count: 1 - (min(max(steps[-1] - count, 0), length) / length) ** power


def sigmoid_progress(steps: range, steepness: float) -> Callable[[int], float]:
    r"""Returns `progress(count)` of a sigmoid from 0 at the first rewiring to 1 at the last.

    It is $\sigma(k (x - 1/2))$ of the share x of the time, stretched to reach 0 and 1.

    Args:
      steps: Counts of the rewirings.
      steepness: k.
    """
    length = max(steps[-1] - steps[0], 1)

    def progress(count: int) -> float:
        x = min(max((count - steps[0]) / length, 0.0), 1.0)
        if count >= steps[-1]:
            return 1.0
        # A stretched sigmoid is a stretched hyperbolic tangent.
        return 0.5 + 0.5 * math.tanh(steepness * (x - 0.5) / 2) / math.tanh(steepness / 4)

    return progress


def _largest_first(scores: Arrays, ranking_ids: Sequence[RankingIds]) -> Arrays:
    """Returns scores in which the largest of each layer comes before all others."""
    # 1, or 0 in a layer without an active weight.
    one_each = jnp.minimum(_top_k.counts([s >= 0 for s in scores], ranking_ids), 1)
    largest = _top_k.top_k(scores, ranking_ids, one_each)
    first = jnp.int32(np.iinfo(np.int32).max)
    return [jnp.where(top, first, s) for top, s in zip(largest, scores, strict=True)]


def _power(x: jax.Array, power: float) -> jax.Array:
    # Integer powers are products, which round alike on every device; a general power may not.
    return x ** int(power) if power == int(power) else x ** jnp.float32(power)


def active_at_start(layout: _layout.Layout, packing: Packing, masks: Arrays) -> InitialMemory:
    """Remembers the numbers of active weights of the first masks, int32 [rankings]."""
    del layout
    packed = packing.pack(masks, False)
    return InitialMemory([], _top_k.counts(packed, packing.ranking_ids))


def check_start(
    scope: Scope, initial_masks: PyTree | None
) -> Callable[[_layout.Layout, _layout.Layout], None]:
    """Returns the check at `init`: no fewer weights may be active at the start than at the end."""

    def check(layout: _layout.Layout, start: _layout.Layout) -> None:
        del start  # it has the zeros of the sparsest layer of a stack only; all are needed
        if scope == "global":
            _layout.check_total(layout)
        if initial_masks is None:
            return
        masks = _masks.of_params(initial_masks, layout.paths, layout.leaves, "initial_masks")
        counts = {
            leaf.path: (_zeros(leaf, masks[leaf.path]), leaf.zeros or 0)
            for leaf in layout.sparse
            if not isinstance(masks[leaf.path], jax.core.Tracer)
        }
        if scope == "global":
            sums = [sum(zeros) for zeros, _ in counts.values()]
            ends = [final * len(zeros) for zeros, final in counts.values()]
            counts = {"all layers together": ([sum(sums)], sum(ends))}
        for path, (zeros, final) in counts.items():
            if max(zeros, default=0) > final:
                raise ValueError(
                    f"initial_masks: {path!r} would start with {max(zeros)} zeros and end with "
                    f"{final}, but pruning only removes weights; give a higher sparsity"
                )

    return check


def _zeros(leaf: _layout.SparseLeaf, mask: Any) -> list[int]:
    """Counts the inactive groups of each ranking of a leaf."""
    with jax.ensure_compile_time_eval():  # `init` may be traced; the mask is not
        groups = np.asarray(leaf.groups(jnp.asarray(mask)))
    return [int(x) for x in np.sum(~groups.reshape(leaf.rankings, -1), axis=1)]


def needed(sparsity: Sparsity | None) -> Sparsity:
    """Returns the final sparsity; raises a ValueError if there is none."""
    if sparsity is None:
        raise ValueError(
            "sparsity=None: pruning needs the final sparsity, a number in [0, 1) or a distribution"
        )
    return sparsity
