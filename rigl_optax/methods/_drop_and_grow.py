"""Methods that drop by one score and grow as many by another: the rule they share."""

import math
from collections.abc import Callable, Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rigl_optax import _numbers, _plan
from rigl_optax._layout import Layout, check_total, layer_ids
from rigl_optax._ranking import _keep_and_grow, _order, _packing, _random, _top_k
from rigl_optax._ranking._packing import Packing, RankingIds
from rigl_optax._structures import UNSTRUCTURED, Structures
from rigl_optax._types import Arrays, Overrides, PyTree, Seed, Sparsity
from rigl_optax._wrapper import _transform
from rigl_optax._wrapper._method import Decision, Method, RewiringInputs
from rigl_optax._wrapper._newborn import AT_REST, Grown
from rigl_optax._xla import _sharding
from rigl_optax.methods import _ablation, _min_fan_in

# scores(inputs) -> int32 arrays laid out as inputs.weights; -1 for never.
Scores: TypeAlias = Callable[[RewiringInputs], Arrays]
# remember(count, memory, gradient) -> memory, of one leaf.
Remember: TypeAlias = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
# grow_counts(total, room of each layer, inputs) -> how much of it each layer grows, int32 [layers].
GrowCounts: TypeAlias = Callable[[jax.Array, jax.Array, RewiringInputs], jax.Array]


def keep_by_magnitude(inputs: RewiringInputs) -> Arrays:
    """Scores active weights by their magnitudes: the smallest are dropped."""
    return [_top_k.magnitude_scores(w) for w in inputs.weights]


def grow_by_gradient(inputs: RewiringInputs) -> Arrays:
    """Scores positions by the magnitudes of their dense gradients, as RigL does.

    Or of what `remember` made of the gradients.
    """
    return [_top_k.magnitude_scores(g) for g in inputs.gradients]


def grow_at_random(seed: Seed) -> Scores:
    """Makes scores that are uniformly random and other ones at each rewiring, as SET's.

    They depend on the seed, the leaf, the position and the count alone: not on devices or restarts.
    """

    def scores(inputs: RewiringInputs) -> Arrays:
        positions = [leaf.position for leaf in inputs.leaves]
        purpose = _random.Purpose.GROWTH
        return _random.random_scores(
            seed, purpose, positions, inputs.packing, inputs.count, inputs.indices
        )

    return scores


def grow_among_candidates(grow_scores: Scores, ratio: float, seed: Seed) -> Scores:
    """Makes scores of the inactive positions in a random sample; -1 for all others.

    Args:
      grow_scores: The scores of the sample.
      ratio: How many positions are sampled in each layer, for each of its active weights.
      seed: Seeds the sample, which is another one at each rewiring.
    """

    def scores(inputs: RewiringInputs) -> Arrays:
        packing, rows = inputs.packing, inputs.packing.ranking_ids
        positions = [leaf.position for leaf in inputs.leaves]
        purpose, sizes = _random.Purpose.CANDIDATE, _sizes(inputs)
        ranks = _order.ranks(seed, purpose, positions, packing, sizes, inputs.count, inputs.indices)
        ranks = [_sharding.like(r, mask) for r, mask in zip(ranks, inputs.masks, strict=True)]
        active = inputs.active()
        # As float32 first: the product may be more than int32 holds.
        wanted = jnp.minimum(active.astype(jnp.float32) * jnp.float32(ratio), jnp.float32(2**30))
        number = jnp.minimum(wanted.astype(jnp.int32), jnp.asarray(sizes))
        each = zip(inputs.masks, ranks, grow_scores(inputs), rows, strict=True)
        excluded = jnp.int32(_top_k.EXCLUDED)
        return [
            jnp.where(~mask & (rank < _top_k.spread(number, rank, ids)), s, excluded)
            for mask, rank, s, ids in each
        ]

    return scores


def sample_size(active: int, ratio: float, size: int) -> int:
    """Returns how many of `size` positions `grow_among_candidates` samples."""
    return min(size, int(np.minimum(np.float32(active) * np.float32(ratio), np.float32(2**30))))


def _sizes(inputs: RewiringInputs) -> np.ndarray:
    """Counts the positions of each ranking, listed or not, int32 [rankings]."""
    if inputs.indices is None:
        return inputs.packing.sizes()
    # Of condensed single weights, a list; of blocks, all.
    whole = [
        math.prod(leaf.layer_shape if leaf.structure == UNSTRUCTURED else leaf.grid)
        for leaf in inputs.leaves
    ]
    return np.asarray(whole, np.int32)


def drop_and_grow(
    inner: optax.GradientTransformation,
    sparsity: Sparsity | None,
    *,
    keep_scores: Scores = keep_by_magnitude,
    grow_scores: Scores = grow_by_gradient,
    end: int,
    every: int = 100,
    begin: int = 0,
    drop_fraction: float | optax.Schedule = 0.3,
    needs_signal: bool = True,
    remember: Remember | None = None,
    overrides: Overrides | None = None,
    gradient_step: bool = False,
    min_fan_in: int = 0,
    grown: Grown = AT_REST,
    structure: Structures = UNSTRUCTURED,
    initial_masks: PyTree | None = None,
    seed: Seed = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Makes a method of two scores: what is kept, and what grows.

    Use it to write a method of your own (docs/write_a_method.md). At a rewiring, in each layer with
    n active weights,

    $$
    \begin{aligned}
    k &= \mathrm{int32}(n \cdot f(t)) \\
    K &= \text{the } n - k \text{ active weights of largest keep score} \\
    G &= \text{the } k \text{ positions outside } K \text{ of largest grow score} \\
    \text{active} &\leftarrow K \cup G
    \end{aligned}
    $$

    Both are functions of `RewiringInputs` to lists of int32 arrays, laid out as `inputs.weights`.
    Scores are 0 or above; -1 means never. `magnitude_scores` makes them of floats, and
    `add_scores` adds them. The number of active weights never changes: an active weight whose keep
    score is -1 is among the first to be dropped, and where too few positions may grow, less is
    dropped. Under `NM` and `ConstantFanIn`, where each part of a layer grows what it lost, a
    position whose grow score is -1 is among the last to grow.

    Args:
      inner: As in `rigl`.
      sparsity: As in `rigl`.
      keep_scores: `keep_scores(inputs) -> scores`; those of inactive weights are not looked at.
      grow_scores: `grow_scores(inputs) -> scores`, as `grow_at_random(seed)`.
      end: As in `rigl`.
      every: As in `rigl`.
      begin: As in `rigl`.
      drop_fraction: As in `rigl`.
      needs_signal: Whether a layer keeps its mask where all grow scores outside K are 0, since
        they do not say where to grow. False for random growth.
      remember: `remember(count, memory, gradient) -> memory` of each sparse leaf, float32, at
        every call; zeros at first. `inputs.gradients` is the memory then.
      overrides: As in `rigl`.
      gradient_step: As in `rigl`.
      min_fan_in: As in `rigl`.
      grown: As in `rigl`.
      structure: As in `rigl`.
      initial_masks: As in `rigl`.
      seed: Seeds the initial masks, and what `grown` draws.

    Returns:
      A transformation whose state is a `SparseState`.

    Raises:
      TypeError: At the first `update`, if scores are not int32 arrays laid out as the weights.
      ValueError: As `rigl` does.

    Examples:
      RigL:

      >>> import optax, rigl_optax
      >>> tx = rigl_optax.drop_and_grow(
      ...     optax.sgd(0.1),
      ...     0.9,
      ...     keep_scores=rigl_optax.keep_by_magnitude,
      ...     grow_scores=rigl_optax.grow_by_gradient,
      ...     end=1_000,
      ... )
    """
    method = drop_and_grow_method(
        _checked("grow_scores", grow_scores),
        keep_scores=_checked("keep_scores", keep_scores),
        end=end,
        every=every,
        begin=begin,
        drop_fraction=drop_fraction,
        overrides=overrides,
        gradient_step=gradient_step,
        min_fan_in=min_fan_in,
        grown=grown,
        seed=seed,
        needs_signal=needs_signal,
        remember=remember,
        may_refuse=True,
    )
    return _transform.sparse_transform(
        inner, sparsity, method, initial_masks=initial_masks, seed=seed, structure=structure
    )


def most_dropped(drop_fraction: float | optax.Schedule, overrides: Overrides | None) -> float:
    """Returns the largest fraction that any layer ever drops; 1 for schedules: not known before."""
    others = [o["drop_fraction"] for o in (overrides or {}).values() if "drop_fraction" in o]
    return max(1.0 if callable(f) else float(f) for f in [drop_fraction, *others])


def drop_and_grow_method(
    grow_scores: Scores,
    *,
    keep_scores: Scores = keep_by_magnitude,
    end: int,
    every: int,
    begin: int,
    drop_fraction: float | optax.Schedule,
    overrides: Overrides | None,
    gradient_step: bool,
    min_fan_in: int,
    grown: Grown,
    seed: Seed,
    needs_signal: bool = True,
    grow_counts: GrowCounts | None = None,
    remember: Remember | None = None,
    may_refuse: bool = False,
    after_drops: bool = False,
) -> Method:
    """Makes the method that keeps and grows by these scores.

    Args:
      grow_scores: As in `drop_and_grow`, and so all that is not said here.
      keep_scores: As in `drop_and_grow`.
      end: As in `drop_and_grow`.
      every: As in `drop_and_grow`.
      begin: As in `drop_and_grow`.
      drop_fraction: As in `drop_and_grow`.
      overrides: As in `drop_and_grow`.
      gradient_step: As in `drop_and_grow`.
      min_fan_in: As in `drop_and_grow`.
      grown: As in `drop_and_grow`.
      seed: As in `drop_and_grow`.
      needs_signal: As in `drop_and_grow`.
      grow_counts: How what is dropped is shared out between the layers that are due; None for
        as many as each dropped. What a layer needs for `min_fan_in`, and for one active weight, it
        grows itself.
      remember: As in `drop_and_grow`.
      may_refuse: Whether scores may be -1, and may be anything where there is only padding.
      after_drops: Whether `grow_scores` see the masks of what is kept, in place of the old ones.
        Not with `needs_signal` or `may_refuse`.

    Returns:
      The method for `sparse_transform`.
    """
    plan = _plan.rewiring_plan(
        begin=begin, end=end, every=every, drop_fraction=drop_fraction, overrides=overrides
    )
    grown.check()
    min_fan_in = _numbers.integer("min_fan_in", min_fan_in, least=0)

    def check(layout: Layout, start: Layout) -> None:
        if min_fan_in:
            _min_fan_in.check(start, min_fan_in)
        if grow_counts is not None:
            check_total(layout)

    def rule_of_parts(inputs: RewiringInputs) -> Decision:
        # Drops are of the whole layer; what a part of it lost, it grows.
        rows, layers = inputs.packing.ranking_ids, layer_ids(inputs.leaves)
        active = _top_k.counts(inputs.masks, layers)
        fraction = plan.fractions_of(
            inputs.count, inputs.leaves, [leaf.layers for leaf in inputs.leaves]
        )
        keep = active - _keep_and_grow.drop_counts(active, fraction)
        to_keep = _of_active(keep_scores(inputs), inputs.masks)
        kept = _top_k.top_k(to_keep, layers, keep)
        to_grow = grow_scores(inputs._replace(masks=kept) if after_drops else inputs)
        if may_refuse:
            # A part must be able to grow what it lost: what may not grow comes last.
            to_grow = [jnp.maximum(s, 0) for s in to_grow]
        has_signal = _keep_and_grow.signals(kept, to_grow, layers)
        wanted = _top_k.counts_by_row(inputs.masks, rows)
        if any(leaf.structure.min_salient for leaf in inputs.leaves):
            would_grow = _top_k.top_k(_without(kept, to_grow), layers, active - keep)
            kept_counts = _top_k.counts_by_row(kept, rows)
            salient = jax.tree.map(jnp.add, kept_counts, _top_k.counts_by_row(would_grow, rows))
            wanted = _ablation.fan_ins(inputs.leaves, salient, wanted)
            # A unit that others have come back beside may have kept more than it is to have.
            left = _without([~k for k in kept], to_keep)
            kept = _top_k.top_k(left, rows, jax.tree.map(jnp.minimum, kept_counts, wanted))
        chosen = regrown_in_parts(kept, to_grow, rows, wanted)
        if not needs_signal:
            return Decision(chosen)
        return _decision(
            _keep_and_grow.unless_uninformed(
                chosen, inputs.masks, has_signal, active - keep, layers
            )
        )

    def rule(inputs: RewiringInputs) -> Decision:
        if any(leaf.structure.has_parts for leaf in inputs.leaves):
            return rule_of_parts(inputs)
        rows, packing = inputs.packing.ranking_ids, inputs.packing
        active = _top_k.counts(inputs.masks, rows)
        fraction = plan.fractions(inputs.count, inputs.leaves, packing)
        dropped = _keep_and_grow.drop_counts(active, fraction)
        keep = active - dropped

        def shared_out(has_signal: jax.Array) -> jax.Array:
            assert grow_counts is not None
            # A layer that is not due, or stays as it is, neither gives nor takes.
            due = plan.are_due(inputs.count, inputs.leaves, packing)
            takes_part = has_signal if due is None else has_signal & due
            given = jnp.where(takes_part, dropped, 0)
            room = jnp.where(takes_part, jnp.asarray(packing.sizes()) - keep, 0)
            least = jnp.asarray(_min_fan_in.least(inputs.leaves, packing, min_fan_in))
            own = jnp.clip(least - keep, 0, given)
            total = jnp.sum(given, dtype=jnp.int32) - jnp.sum(own, dtype=jnp.int32)
            return own + grow_counts(total, room - own, inputs)

        to_keep = _of_active(keep_scores(inputs), inputs.masks)
        to_grow = [] if after_drops else grow_scores(inputs)
        if may_refuse:
            to_grow = without_padding(to_grow, packing)
            # Less is dropped where too little may grow: numbers never change.
            pairs = zip(inputs.masks, to_grow, strict=True)
            growable = _top_k.counts([~m & (s >= 0) for m, s in pairs], rows)
            dropped = jnp.minimum(dropped, growable)
            keep = active - dropped

        def after(kept: Arrays) -> Arrays:
            return grow_scores(inputs._replace(masks=kept)) if after_drops else to_grow

        prefer = after if after_drops else None
        if min_fan_in:
            to_keep = _min_fan_in.protected(to_keep, inputs.leaves, packing, min_fan_in)

            def prefer(kept: Arrays) -> Arrays:
                scores = after(kept)
                first = _min_fan_in.preferred(scores, inputs.leaves, packing, min_fan_in)
                return first(kept)

        if not needs_signal:
            return Decision(
                _keep_and_grow.keep_and_grow(to_keep, to_grow, rows, keep, dropped, prefer)
            )
        return _decision(
            _keep_and_grow.keep_and_grow_by_signal(
                inputs.masks,
                to_keep,
                to_grow,
                rows,
                keep,
                dropped if grow_counts is None else shared_out,
                dropped=dropped,
                layers=rows,
                prefer=prefer,
            )
        )

    return Method(
        plan,
        rule,
        replaces_step=not gradient_step,
        remember=remember,
        grown_values=grown.values(seed),
        keeps_initial=grown.value == "initial",
        grown_state=grown.state,
        check=check,
        ablates=True,
        moves_between_layers=grow_counts is not None,
    )


def _decision(rewired: _keep_and_grow.Grown) -> Decision:
    return Decision(rewired.masks, uninformed=rewired.uninformed)


def _checked(name: str, scores: Scores) -> Scores:
    """Wraps scores of a user's own: raises a TypeError if they cannot be ranked."""

    def checked(inputs: RewiringInputs) -> Arrays:
        found = scores(inputs)
        if not isinstance(found, list | tuple) or [
            (jnp.shape(x), jnp.result_type(x)) for x in found
        ] != [(w.shape, jnp.int32) for w in inputs.weights]:
            shown = [jnp.asarray(x) for x in jax.tree.leaves(found)]
            raise TypeError(
                f"{name}: must return int32 arrays laid out as inputs.weights, of shapes "
                f"{[w.shape for w in inputs.weights]}; returned "
                f"{[f'{x.dtype}{list(x.shape)}' for x in shown]}. rigl_optax.magnitude_scores "
                "makes scores of floats"
            )
        least = 0 if name == "keep_scores" else _top_k.EXCLUDED
        return [jnp.maximum(x, jnp.int32(least)) for x in found]

    return checked


def without_padding(scores: Arrays, packing: Packing) -> Arrays:
    """Excludes what is no position of a layer."""
    if not packing.is_packed:
        return scores
    (score,), (rows,) = scores, packing.ranking_ids
    to_row = rows.ids.shape + (1,) * (score.ndim - rows.ids.ndim)
    within = rows.starts.reshape(to_row) + _packing.iota(score.shape, rows.ids.ndim)
    is_position = within < packing.sizes()[rows.ids].reshape(to_row)
    return [jnp.where(is_position, score, jnp.int32(_top_k.EXCLUDED))]


def _of_active(scores: Arrays, masks: Arrays) -> Arrays:
    """Excludes what is not active."""
    excluded = jnp.int32(_top_k.EXCLUDED)
    return [jnp.where(m, s, excluded) for m, s in zip(masks, scores, strict=True)]


def regrown_in_parts(
    kept: Arrays, grow_scores: Arrays, rows: Sequence[RankingIds], wanted: Arrays
) -> Arrays:
    """Grows the largest scores of each part, up to its number, beside what is kept.

    Args:
      kept: Bool arrays.
      grow_scores: int32 arrays of the same shapes.
      rows: The parts.
      wanted: How many each part is to have, at least as many as it kept.

    Returns:
      Bool arrays.
    """
    lost = jax.tree.map(jnp.subtract, wanted, _top_k.counts_by_row(kept, rows))
    grown = _top_k.top_k(_without(kept, grow_scores), rows, lost)
    return [k | g for k, g in zip(kept, grown, strict=True)]


def _without(masks: Arrays, scores: Arrays) -> Arrays:
    """Excludes what is in the masks."""
    excluded = jnp.int32(_top_k.EXCLUDED)
    return [jnp.where(m, excluded, s) for m, s in zip(masks, scores, strict=True)]
