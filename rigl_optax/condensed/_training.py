"""Trains condensed weights: nothing dense exists between rewirings, nor during them.

The rule of the masked form decides, on grids of blocks or on lists of the single weights that may
be active next, so the masks are the same.
"""

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rigl_optax import _paths
from rigl_optax._layout import Layout
from rigl_optax._plan import RewiringPlan
from rigl_optax._ranking import _packing, _random
from rigl_optax._types import Overrides, PyTree, Seed
from rigl_optax._wrapper import _inner_state, _rewiring
from rigl_optax._wrapper._method import Method, RewiringInputs
from rigl_optax._wrapper._newborn import AT_REST
from rigl_optax.condensed import _conversion, _devices
from rigl_optax.condensed._conversion import Topologies
from rigl_optax.condensed._topology import Move, RandomGrowth, Ranking, Topology
from rigl_optax.methods import _drop_and_grow
from rigl_optax.methods.mest import keep_by_magnitude_and_gradient
from rigl_optax.methods.rigl import check_candidates

_MISSED = "call rewire, in place of update, where is_rewiring_step(count): update never rewires."

# `loss(kernels, *args) -> scalar`, of the tree that `bind` makes.
Loss = Callable[..., jax.Array]


class CondensedState(NamedTuple):
    """State of the training of condensed weights.

    Attributes:
      count: int32 scalar: calls of `update` and `rewire` so far.
      topologies: `{path: topology}` of the condensed kernels, as they are now.
      inner_state: State of the wrapped optimizer, on the stored values.
      rewirings: int32 scalar: rewirings so far.
      uninformed: As in `rigl_optax.SparseState`.
    """

    count: jax.Array  # type: ignore[assignment]
    topologies: dict[str, Topology]
    inner_state: PyTree
    rewirings: jax.Array
    uninformed: jax.typing.ArrayLike = np.int32(0)


class CondensedTransformation(NamedTuple):
    """An optimizer of condensed weights that also rewires them.

    Attributes:
      init: `init(weights, topologies) -> state`.
      update: `update(grads, state, weights) -> (updates, state)`: an ordinary step, as in Optax.
      rewire: `rewire(grads, scores, state, weights) -> (weights, state)`: replaces `update` where
        `is_rewiring_step(state.count)`. It returns new weights, not updates.
      is_rewiring_step: `is_rewiring_step(count) -> bool scalar`, under `jit` too.
      check: `check(state)` raises a RuntimeError if rewirings were due and have not happened, as
        where only `update` is called. Outside `jit`, `update` also warns at the first rewiring
        that it is called for; under `jit` it cannot.
      plan: The schedule of rewirings, for each layer; None if there are none.
    """

    init: Callable[[PyTree, Topologies], CondensedState]
    update: Callable[..., tuple[PyTree, CondensedState]]
    rewire: Callable[..., tuple[PyTree, CondensedState]]
    is_rewiring_step: Callable[[jax.typing.ArrayLike], jax.Array]
    check: Callable[[CondensedState], None]
    plan: RewiringPlan | None = None


def rigl(
    inner: optax.GradientTransformation,
    *,
    end: int,
    every: int = 100,
    begin: int = 0,
    drop_fraction: float | optax.Schedule = 0.3,
    candidates: float | None = None,
    overrides: Overrides | None = None,
    min_fan_in: int = 0,
    seed: Seed = 0,
) -> CondensedTransformation:
    r"""RigL on condensed weights: as `rigl_optax.rigl`, and nothing dense exists.

    Masks and weights are those of the masked form, up to rounding. On an ordinary step the
    optimizer sees the stored values. At a rewiring, in each layer with n blocks, or n single
    weights,

    $$
    \begin{aligned}
    k &= \mathrm{int32}(n \cdot f(t)) \\
    K &= \text{the } n - k \text{ blocks of largest } \mathrm{pool}(\theta) \\
    G &= \text{the } k \text{ places outside } K
         \text{ of largest } \mathrm{pool}(\nabla_\theta L)
    \end{aligned}
    $$

    where places are blocks or single weights too. The stored values and the optimizer's state
    keep to their blocks in the new order; new blocks start at 0 with a state at rest. Topologies
    stay if scores or gradients are not finite, or if a kernel of single weights is not used
    exactly once in the loss (`CSR`). All shapes are static. Compile one function with `update` and
    another with `rewire`, and call the one that `is_rewiring_step` says.

    Args:
      inner: Any Optax optimizer.
      end: No rewiring happens from this count on.
      every: Steps between rewirings.
      begin: Count of the first rewiring.
      drop_fraction: Fraction of the blocks, or weights, of a layer to replace. For single weights
        a number also bounds how many candidates are kept; a schedule could ask for all of them.
      candidates: As in `rigl_optax.rigl`. For single weights the gradients of the sample alone are
        computed: a rewiring takes time in proportion to the stored weights, and a kernel may be
        used several times. For blocks it decides on masks, and saves nothing.
      overrides: As in `rigl_optax.rigl`: other schedules for some layers.
      min_fan_in: Each output block keeps at least this many blocks; 0 for single weights.
      seed: Seed of the candidates.

    Returns:
      A `CondensedTransformation`.

    Raises:
      TypeError, ValueError: As in `rigl_optax.rigl`; at `init`, if topologies do not fit weights.

    Examples:
      >>> import jax.numpy as jnp, optax, rigl_optax
      >>> from rigl_optax import condensed
      >>> topologies = {"w": condensed.random_topology((8, 8), 0.5, rigl_optax.Block(2, 2))}
      >>> weights = {"w": jnp.ones(topologies["w"].values_shape)}
      >>> tx = condensed.rigl(optax.adam(1e-2), end=100)
      >>> state = tx.init(weights, topologies)
      >>> def loss(kernels, x):
      ...     return jnp.mean((x @ kernels["w"] - 1) ** 2)
      >>> step = condensed.value_grad_and_scores(loss)
      >>> value, grads, scores = step(weights, state.topologies, jnp.eye(8))
      >>> bool(tx.is_rewiring_step(state.count))
      True
      >>> weights, state = tx.rewire(grads, scores, state, weights)
      >>> int(state.rewirings), weights["w"].shape
      (1, (8, 2, 2))

    References:
      Evci et al., [Rigging the Lottery: Making All Tickets
      Winners](https://arxiv.org/abs/1911.11134), 2020, algorithm 1; `candidates`: Heddes et al.,
      [Always-sparse training by growing connections with guided stochastic
      exploration](https://arxiv.org/abs/2401.06898), 2024.
    """
    growth: _drop_and_grow.Scores = _drop_and_grow.grow_by_gradient
    if candidates is not None:
        candidates = check_candidates(candidates, min_fan_in)
        growth = _drop_and_grow.grow_among_candidates(growth, candidates, seed)
    return _drops_and_grows(
        inner,
        growth,
        sample=None if candidates is None else (candidates, seed),
        end=end,
        every=every,
        begin=begin,
        drop_fraction=drop_fraction,
        overrides=overrides,
        min_fan_in=min_fan_in,
    )


def sparse_evolutionary_training(
    inner: optax.GradientTransformation,
    *,
    end: int,
    every: int = 100,
    begin: int = 0,
    drop_fraction: float | optax.Schedule = 0.3,
    overrides: Overrides | None = None,
    min_fan_in: int = 0,
    seed: Seed = 0,
) -> CondensedTransformation:
    """SET on condensed weights: as `rigl`, but growth is uniformly random.

    It needs no scores: pass `rewire` the zeros that `probes` makes.

    Args:
      inner: As in `rigl`.
      end: As in `rigl`.
      every: As in `rigl`.
      begin: As in `rigl`.
      drop_fraction: As in `rigl`.
      overrides: As in `rigl`.
      min_fan_in: As in `rigl`.
      seed: Seed of the growth.

    Returns:
      A `CondensedTransformation`.

    Raises:
      ValueError: As `rigl`.
    """
    return _drops_and_grows(
        inner,
        _drop_and_grow.grow_at_random(seed),
        growth_seed=seed,
        end=end,
        every=every,
        begin=begin,
        drop_fraction=drop_fraction,
        overrides=overrides,
        min_fan_in=min_fan_in,
    )


def mest(
    inner: optax.GradientTransformation,
    *,
    end: int,
    every: int = 100,
    begin: int = 0,
    drop_fraction: float | optax.Schedule = 0.3,
    gradient_weight: float = 1.0,
    overrides: Overrides | None = None,
    min_fan_in: int = 0,
    seed: Seed = 0,
) -> CondensedTransformation:
    """MEST on condensed weights: as `rigl_optax.mest`, and nothing dense exists.

    Only gradients of stored weights decide, so a rewiring costs no more backward pass than an
    ordinary step. It needs no scores: pass `rewire` the zeros that `probes` makes.

    Args:
      inner: As in `rigl`.
      end: As in `rigl`.
      every: As in `rigl`.
      begin: As in `rigl`.
      drop_fraction: As in `rigl`.
      gradient_weight: As in `rigl_optax.mest`.
      overrides: As in `rigl`.
      min_fan_in: As in `rigl`.
      seed: Seed of the growth.

    Returns:
      A `CondensedTransformation`.

    Raises:
      ValueError: As `rigl`; if `gradient_weight` is not a finite number of at least 0.

    Examples:
      >>> import jax.numpy as jnp, optax, rigl_optax
      >>> from rigl_optax import condensed
      >>> topologies = {"w": condensed.random_topology((8, 8), 0.5, rigl_optax.Unstructured())}
      >>> weights = {"w": jnp.ones(topologies["w"].values_shape)}
      >>> tx = condensed.mest(optax.adam(1e-2), end=100)
      >>> state = tx.init(weights, topologies)
      >>> scores = condensed.probes(state.topologies)
      >>> weights, state = tx.rewire(weights, scores, state, weights)
      >>> int(state.rewirings), weights["w"].shape
      (1, (32,))
    """
    return _drops_and_grows(
        inner,
        _drop_and_grow.grow_at_random(seed),
        keep_scores=keep_by_magnitude_and_gradient(gradient_weight),
        growth_seed=seed,
        end=end,
        every=every,
        begin=begin,
        drop_fraction=drop_fraction,
        overrides=overrides,
        min_fan_in=min_fan_in,
    )


def static_sparse(inner: optax.GradientTransformation) -> CondensedTransformation:
    """Trains condensed weights whose topologies never change.

    Args:
      inner: Any Optax optimizer.

    Returns:
      A `CondensedTransformation`, whose `rewire` raises: no step is a rewiring step.

    Examples:
      >>> import jax.numpy as jnp, optax, rigl_optax
      >>> from rigl_optax import condensed
      >>> topologies = {"w": condensed.random_topology((8, 8), 0.5, rigl_optax.Block(2, 2))}
      >>> weights = {"w": jnp.ones(topologies["w"].values_shape)}
      >>> tx = condensed.static_sparse(optax.adam(1e-2))
      >>> bool(tx.is_rewiring_step(tx.init(weights, topologies).count))
      False
    """
    return _transformation(inner, None)


def value_and_grad(loss: Loss) -> Callable[..., tuple[jax.Array, PyTree]]:
    """Differentiates a loss of kernels, for ordinary steps.

    Args:
      loss: `loss(kernels, *args) -> scalar`, with kernels as `bind` makes them.

    Returns:
      `function(weights, topologies, *args) -> (value, gradients)`.
    """

    def function(weights: PyTree, topologies: Topologies, *args: Any) -> tuple[jax.Array, PyTree]:
        def bound_loss(weights: PyTree) -> jax.Array:
            return loss(_conversion.bind(weights, topologies), *args)

        return jax.value_and_grad(bound_loss)(weights)

    return function


def value_grad_and_scores(
    loss: Loss,
) -> Callable[..., tuple[jax.Array, PyTree, dict[str, Any]]]:
    """Differentiates a loss of kernels, and scores where to grow: for rewiring steps.

    Args:
      loss: As in `value_and_grad`.

    Returns:
      `function(weights, topologies, *args) -> (value, gradients, scores)`. Scores are, for each
      path, those of all blocks; for single weights, of the best places, as many as the topologies
      of a `CondensedState` ask for, or of the sampled places with `candidates`.
    """

    def function(
        weights: PyTree, topologies: Topologies, *args: Any
    ) -> tuple[jax.Array, PyTree, dict[str, Any]]:
        def bound_loss(weights: PyTree, probes: Mapping[str, Any]) -> jax.Array:
            return loss(_conversion.bind(weights, topologies, probes), *args)

        probes = _conversion.probes(topologies)
        value, (grads, scores) = jax.value_and_grad(bound_loss, (0, 1))(weights, probes)
        return value, grads, scores

    return function


def _drops_and_grows(
    inner: optax.GradientTransformation,
    growth: Any,
    *,
    growth_seed: Seed | None = None,
    sample: tuple[float, Seed] | None = None,
    drop_fraction: float | optax.Schedule,
    overrides: Overrides | None,
    min_fan_in: int,
    **arguments: Any,
) -> CondensedTransformation:
    """Builds a method that drops and grows; `growth_seed` if it grows at random.

    `sample` is the ratio and the seed of candidates, if growth is among some.
    """
    method = _drop_and_grow.drop_and_grow_method(
        growth,
        drop_fraction=drop_fraction,
        overrides=overrides,
        gradient_step=False,
        min_fan_in=min_fan_in,
        grown=AT_REST,
        # Newborn weights start at 0: where gradients decide nothing is random.
        seed=0 if growth_seed is None else growth_seed,
        needs_signal=growth_seed is None,
        may_refuse=sample is not None,
        **arguments,
    )
    most = _drop_and_grow.most_dropped(drop_fraction, overrides)
    return _transformation(inner, method, most, min_fan_in, growth_seed, sample)


def _transformation(
    inner: optax.GradientTransformation,
    method: Method | None,
    most_dropped: float = 1.0,
    min_fan_in: int = 0,
    growth_seed: Seed | None = None,
    sample: tuple[float, Seed] | None = None,
) -> CondensedTransformation:
    """Makes a transformation of a method of the masked form.

    Args:
      inner: The optimizer.
      method: Its rule and plan; None never rewires.
      most_dropped: The largest fraction that any rewiring drops.
      min_fan_in: As in `rigl`.
      growth_seed: Seed of random growth; None if scores decide.
      sample: Ratio and seed of the candidates for growth; None if all positions are.
    """
    if not callable(getattr(inner, "init", None)) or not callable(getattr(inner, "update", None)):
        raise TypeError(
            f"inner={inner!r}: must be an Optax transformation, as optax.sgd(0.1); it has no "
            "init and update"
        )
    for seed in (growth_seed, None if sample is None else sample[1]):
        if seed is not None:
            _random.check_seed(seed)
    inner = optax.with_extra_args_support(inner)
    warned: list[int] = []  # the count of the first missed rewiring, which alone is warned of
    plan = None if method is None else method.plan

    def init(weights: PyTree, topologies: Topologies) -> CondensedState:
        if not topologies:
            raise ValueError("topologies is empty: nothing is condensed")
        _conversion.check(weights, topologies)
        layout = _layout(weights, topologies)
        if method is not None:
            for leaf in layout.sparse:
                topologies[leaf.path].check_rewirable(leaf.path, min_fan_in)
        if plan is not None:
            plan.check([leaf.path for leaf in layout.sparse])
        if method is not None and method.check is not None:
            method.check(layout, layout)
        limited = {path: t.limited(most_dropped) for path, t in topologies.items()}
        if sample is not None:
            for leaf in layout.sparse:
                own = limited[leaf.path]
                limited[leaf.path] = own.with_sample(*sample, leaf.position)
        # Copies: a step that donates the state must not delete the caller's arrays.
        return CondensedState(
            count=jnp.zeros((), jnp.int32),
            topologies={path: jax.tree.map(jnp.copy, t) for path, t in limited.items()},
            inner_state=inner.init(weights),
            rewirings=jnp.zeros((), jnp.int32),
            uninformed=jnp.zeros((), jnp.int32),
        )

    def update(
        grads: PyTree, state: CondensedState, weights: PyTree, **extra_args: Any
    ) -> tuple[PyTree, CondensedState]:
        is_known = not isinstance(state.count, jax.core.Tracer)
        if is_known and not warned and is_rewiring_step(state.count):
            warned.append(int(state.count))
            warnings.warn(f"update at count {warned[0]}: {_MISSED}", stacklevel=2)
        updates, inner_state = inner.update(grads, state.inner_state, weights, **extra_args)
        count = optax.safe_increment(state.count)
        topologies = {path: t.at_count(count) for path, t in state.topologies.items()}
        return updates, state._replace(count=count, topologies=topologies, inner_state=inner_state)

    def rewire(
        grads: PyTree,
        scores: Mapping[str, Any],
        state: CondensedState,
        weights: PyTree,
        **extra_args: Any,
    ) -> tuple[PyTree, CondensedState]:
        if method is None:
            raise ValueError("rewire: the topologies of static_sparse never change")
        # A rewiring may move a block to another device, which types of explicit axes cannot say:
        # here the compiler decides what crosses devices.
        rewired = functools.partial(_rewired, method, extra_args)
        return _devices.by_compiler(rewired, (weights, state))(grads, scores, state, weights)

    def _rewired(
        method: Method,
        extra_args: Mapping[str, Any],
        grads: PyTree,
        scores: Mapping[str, Any],
        state: CondensedState,
        weights: PyTree,
    ) -> tuple[PyTree, CondensedState]:
        layout = _layout(weights, state.topologies)
        named = zip(layout.paths, jax.tree.leaves(grads), strict=True)
        stored_grads = {path: g for path, g in named if path in state.topologies}
        rankings = _rankings(layout, stored_grads, scores, state)
        inputs = _inputs(layout, rankings, state.count)
        # The gradients of stored weights too: random growth is passed zeros for scores.
        inspected = [*jax.tree.leaves(scores), *stored_grads.values()]
        is_accepted = _rewiring.total([~jnp.isfinite(x) for x in inspected]) == 0
        for ranking in rankings:
            is_accepted = is_accepted & ranking.is_valid
        outcome = method.rule(inputs)
        masks = inputs.packing.unpack(outcome.masks)
        moves = {
            leaf.path: _unless_refused(ranking.move(mask), state.topologies[leaf.path], is_accepted)
            for leaf, ranking, mask in zip(layout.sparse, rankings, masks, strict=True)
        }
        new_weights = layout.treedef.unflatten(
            [
                moves[path].apply(leaf, jnp.zeros_like(leaf)) if path in moves else leaf
                for path, leaf in zip(layout.paths, layout.leaves, strict=True)
            ]
        )
        # The optimizer is called so that its counters, and with them schedules, stay aligned with
        # the loop. Where a rewiring is refused it sees zeros: a NaN would stay in what it averages
        # over a layer for ever.
        inner_grads = jax.tree.map(lambda g: jnp.where(is_accepted, g, jnp.zeros_like(g)), grads)
        _, stepped = inner.update(inner_grads, state.inner_state, weights, **extra_args)
        uninformed = jnp.zeros((), jnp.int32)
        if outcome.uninformed is not None:
            uninformed = jnp.where(is_accepted, outcome.uninformed, 0)
        inner_state = _settled(
            layout, moves, state.inner_state, stepped, weights, inner, new_weights
        )
        count = optax.safe_increment(state.count)
        return new_weights, CondensedState(
            count=count,
            topologies={path: moves[path].topology.at_count(count) for path in state.topologies},
            inner_state=inner_state,
            rewirings=_rewiring.saturating_add(state.rewirings, is_accepted.astype(jnp.int32)),
            uninformed=_rewiring.saturating_add(jnp.asarray(state.uninformed), uninformed),
        )

    def _rankings(
        layout: Layout,
        gradients: Mapping[str, jax.Array],
        scores: Mapping[str, Any],
        state: CondensedState,
    ) -> list[Ranking]:
        rankings = []
        for leaf in layout.sparse:
            topology, values = state.topologies[leaf.path], layout.leaves[leaf.position]
            growth = None
            if growth_seed is not None:
                growth = RandomGrowth(growth_seed, leaf.position, state.count)
            own = gradients[leaf.path], scores[leaf.path]
            rankings.append(topology.rank(values, *own, growth))
        return rankings

    def is_rewiring_step(count: jax.typing.ArrayLike) -> jax.Array:
        count = jnp.asarray(count, jnp.int32)
        return jnp.zeros((), bool) if plan is None else plan.is_rewiring_step(count)

    def check(state: CondensedState) -> None:
        due = 0 if plan is None else plan.rewirings_before(int(state.count))
        if int(state.rewirings) < due:
            raise RuntimeError(
                f"{int(state.rewirings)} of the {due} rewirings due before count "
                f"{int(state.count)} have happened. {_MISSED} A rewiring is also refused if "
                "gradients or scores are not finite, or a kernel of single weights is not used "
                "exactly once in the loss."
            )

    return CondensedTransformation(init, update, rewire, is_rewiring_step, check, plan)


def _unless_refused(move: Move, old: Topology, is_accepted: jax.Array) -> Move:
    """Returns the move, or if the rewiring is refused, one that leaves all groups in place."""
    stay = Move(old, jnp.arange(move.source.size, dtype=jnp.int32), jnp.ones((), bool))
    return jax.tree.map(lambda new, old: jnp.where(is_accepted, new, old), move, stay)


def _layout(weights: PyTree, topologies: Topologies) -> Layout:
    """Lays out weights as the masked form does params; condensed kernels are the sparse leaves."""
    named = _paths.flatten_with_paths(weights)
    sparse = [
        topologies[path].as_leaf(path, position)
        for position, (path, _) in enumerate(named)
        if path in topologies
    ]
    leaves, treedef = jax.tree.flatten(weights)
    return Layout(treedef, [path for path, _ in named], leaves, sparse)


def _inputs(layout: Layout, rankings: Sequence[Ranking], count: jax.Array) -> RewiringInputs:
    """Packs rankings for the rule of the masked form."""
    packing = _packing.packing([leaf.grid for leaf in layout.sparse], [False] * len(rankings))
    return RewiringInputs(
        count=count,
        weights=packing.pack([each.weights for each in rankings], 0.0),
        gradients=packing.pack([each.gradients for each in rankings], 0.0),
        masks=packing.pack([each.mask for each in rankings], False),
        second_masks=[],
        numbers=(),
        packing=packing,
        leaves=layout.sparse,
        indices=packing.pack([each.indices for each in rankings], 0),
    )


def _settled(
    layout: Layout,
    moves: Mapping[str, Move],
    old: PyTree,
    new: PyTree,
    weights: PyTree,
    inner: optax.GradientTransformation,
    new_weights: PyTree,
) -> PyTree:
    """Returns the optimizer's state after a rewiring, which replaces the gradient step.

    What belongs to a weight keeps its old value (counts of steps, the new one), where its block
    is now; what is new is at rest. All other state (counters, hyperparameters) takes the new value.
    """
    stored = {}
    slots = _inner_state.slots(old, new, inner.init(new_weights), weights)
    for index, slot in slots.items():
        path = layout.paths[slot.owner]
        stored[index] = moves[path].apply(slot.kept, slot.rest) if path in moves else slot.kept
    return _inner_state.replace_leaves(new, stored)
