"""The methods that drop by magnitude and grow as many: one rule, and what grows is theirs."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import optax

from rigl_optax import _numbers, _plan
from rigl_optax._layout import Layout, check_total, layer_ids
from rigl_optax._ranking import _keep_and_grow, _random, _top_k
from rigl_optax._ranking._packing import RankingIds
from rigl_optax._types import Arrays, Overrides, Seed
from rigl_optax._wrapper._method import Method, Outcome, RewiringInputs
from rigl_optax._wrapper._newborn import Grown
from rigl_optax.methods import _ablation, _min_fan_in

GrowScores = Callable[[RewiringInputs], Arrays]
# From what is to be shared out, the room of each layer and the inputs to how much of it each
# layer grows, int32 [rankings].
GrowCounts = Callable[[jax.Array, jax.Array, RewiringInputs], jax.Array]


def gradient_scores(inputs: RewiringInputs) -> Arrays:
    """Magnitudes of the dense gradients, or of what is remembered of them."""
    return [_top_k.magnitude_scores(g) for g in inputs.gradients]


def random_scores(seed: Seed) -> GrowScores:
    """Uniform scores, other ones at each rewiring."""

    def scores(inputs: RewiringInputs) -> Arrays:
        positions = [leaf.position for leaf in inputs.leaves]
        purpose = _random.Purpose.GROWTH
        return _random.random_scores(
            seed, purpose, positions, inputs.packing, inputs.count, inputs.indices
        )

    return scores


def most_dropped(drop_fraction: float | optax.Schedule, overrides: Overrides | None) -> float:
    """The largest fraction that any layer ever drops; 1 for schedules, which only a run tells."""
    others = [o["drop_fraction"] for o in (overrides or {}).values() if "drop_fraction" in o]
    return max(1.0 if callable(f) else float(f) for f in [drop_fraction, *others])


def drop_and_grow_method(
    scores: GrowScores,
    *,
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
    remember: Callable[[jax.Array, jax.Array, jax.Array], jax.Array] | None = None,
) -> Method:
    """The method that keeps what is largest and grows where the scores are.

    Args:
      scores: Of the positions that may grow, int32.
      end: As in `rigl`, and so the others.
      every: As in `rigl`.
      begin: As in `rigl`.
      drop_fraction: As in `rigl`.
      overrides: As in `rigl`.
      gradient_step: As in `rigl`.
      min_fan_in: As in `rigl`.
      grown: As in `rigl`.
      seed: As in `rigl`.
      needs_signal: Whether scores that are all 0 say nothing: then a layer keeps its mask.
      grow_counts: How what is dropped is shared out between the layers that are due; None for
        as many as each dropped. What a layer needs for `min_fan_in`, and for one active weight, it
        grows itself.
      remember: As in `Method`.

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

    def rule_of_parts(inputs: RewiringInputs) -> Outcome:
        # Drops are of the whole layer; what a part of it lost, it grows.
        rows, layers = inputs.packing.ranking_ids, layer_ids(inputs.leaves)
        active = _top_k.counts(inputs.masks, layers)
        fraction = plan.fractions_of(
            inputs.count, inputs.leaves, [leaf.layers for leaf in inputs.leaves]
        )
        keep = active - _keep_and_grow.drop_counts(active, fraction)
        keep_scores = _keep_and_grow.drop_scores(inputs.weights, inputs.masks)
        kept = _top_k.top_k(keep_scores, layers, keep)
        grow_scores = scores(inputs)
        has_signal = _keep_and_grow.signals(kept, grow_scores, layers)
        wanted = _top_k.counts_by_row(inputs.masks, rows)
        if any(leaf.structure.min_salient for leaf in inputs.leaves):
            would_grow = _top_k.top_k(_without(kept, grow_scores), layers, active - keep)
            held = _top_k.counts_by_row(kept, rows)
            salient = jax.tree.map(jnp.add, held, _top_k.counts_by_row(would_grow, rows))
            wanted = _ablation.fan_ins(inputs.leaves, salient, wanted)
            # A unit that others have come back beside may have kept more than it is to have.
            left = _without([~k for k in kept], keep_scores)
            kept = _top_k.top_k(left, rows, jax.tree.map(jnp.minimum, held, wanted))
        chosen = regrown_in_parts(kept, grow_scores, rows, wanted)
        if not needs_signal:
            return Outcome(chosen)
        return _outcome(
            _keep_and_grow.unless_uninformed(
                chosen, inputs.masks, has_signal, active - keep, layers
            )
        )

    def rule(inputs: RewiringInputs) -> Outcome:
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

        keep_scores = _keep_and_grow.drop_scores(inputs.weights, inputs.masks)
        grow_scores = scores(inputs)
        prefer = None
        if min_fan_in:
            keep_scores = _min_fan_in.protected(keep_scores, inputs.leaves, packing, min_fan_in)
            prefer = _min_fan_in.preferred(grow_scores, inputs.leaves, packing, min_fan_in)
        if not needs_signal:
            return Outcome(
                _keep_and_grow.keep_and_grow(keep_scores, grow_scores, rows, keep, dropped, prefer)
            )
        return _outcome(
            _keep_and_grow.keep_and_grow_by_signal(
                inputs.masks,
                keep_scores,
                grow_scores,
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


def _outcome(rewired: _keep_and_grow.Grown) -> Outcome:
    return Outcome(rewired.masks, uninformed=rewired.uninformed)


def regrown_in_parts(
    kept: Arrays, grow_scores: Arrays, rows: Sequence[RankingIds], wanted: Arrays
) -> Arrays:
    """Masks of what is kept, and in each part of the largest scores besides, up to its number.

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
    """Scores of what is not in the masks."""
    excluded = jnp.int32(_top_k.EXCLUDED)
    return [jnp.where(m, excluded, s) for m, s in zip(masks, scores, strict=True)]
