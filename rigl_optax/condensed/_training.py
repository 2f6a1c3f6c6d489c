"""Training of condensed weights: between rewirings nothing dense exists, nor at them.

The same rule as in the masked form decides, on grids of blocks and on lists of the single weights
that may be active next: the same masks come of it.
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
from rigl_optax.condensed import _conversion, _devices, _ranking
from rigl_optax.condensed._conversion import Topologies
from rigl_optax.condensed._ranking import Moved, Propose, Ranked
from rigl_optax.condensed.blocks._topology import Topology
from rigl_optax.condensed.single._csr_topology import CSRTopology
from rigl_optax.methods import _drop_and_grow

_MISSED = "call rewire, in place of update, where is_rewiring_step(count): update never rewires."

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
    topologies: dict[str, Topology | CSRTopology]
    inner_state: PyTree
    rewirings: jax.Array
    uninformed: jax.typing.ArrayLike = np.int32(0)


class CondensedTransformation(NamedTuple):
    """An optimizer of condensed weights that also rewires them.

    Attributes:
      init: From weights and topologies to the state.
      update: As in Optax, an ordinary step: from gradients, state and weights to updates and
        the new state.
      rewire: In place of `update` where `is_rewiring_step(state.count)`: from gradients,
        scores, state and weights to new weights and the new state.
      is_rewiring_step: From a count, traced or not, to a bool scalar.
      check: Raises a RuntimeError if rewirings were due and have not happened, as where `update`
        alone is called; for a state that is not traced. `update` itself warns of the first one
        that it is called for, but under `jit` it cannot.
      plan: The schedule it goes by, layer by layer; None for never.
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
    overrides: Overrides | None = None,
    min_fan_in: int = 0,
    seed: Seed = 0,
) -> CondensedTransformation:
    r"""RigL on condensed weights: what `rigl` does on blocks or single weights, nothing dense.

    Same masks and weights as that one, up to rounding. On an ordinary step the optimizer sees
    the stored values. At a rewiring, in each layer with n blocks, or n single weights,

    .. math::
        k &= \mathrm{int32}(n \cdot f(t)) \\
        K &= \text{the } n - k \text{ blocks of largest } \mathrm{pool}(\theta) \\
        G &= \text{the } k \text{ places outside } K
             \text{ of largest } \mathrm{pool}(\nabla_\theta L)

    and values and optimizer state are moved to where their blocks are now; new blocks start at
    0 with a state at rest. If scores or gradients are not finite, the topologies stay; and if a
    kernel of single weights has not been used exactly once (`CSR`). All shapes are static:
    `update` and `rewire` are for `jax.jit`, best one function each, called as
    `is_rewiring_step` says.

    Args:
      inner: Any Optax optimizer.
      end: As in `rigl_optax.rigl`, and so the others.
      every: Steps between rewirings.
      begin: Count of the first.
      drop_fraction: Fraction of the blocks of a layer to replace. Of single weights so many places
        are looked at as a number allows; with a schedule as many as there are weights.
      overrides: Another schedule for some layers.
      min_fan_in: The least number of blocks that lead to an output block; 0 for single weights.
      seed: Of what is random.

    Returns:
      A `CondensedTransformation`.

    Raises:
      TypeError, ValueError: As `rigl_optax.rigl`; at `init`, if topologies and weights do not fit.

    Example:
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
      Evci et al., `Rigging the Lottery: Making All Tickets Winners
      <https://arxiv.org/abs/1911.11134>`_, 2020, algorithm 1.
    """
    method = _drop_and_grow.drop_and_grow_method(
        _drop_and_grow.grow_by_gradient,
        end=end,
        every=every,
        begin=begin,
        drop_fraction=drop_fraction,
        overrides=overrides,
        gradient_step=False,
        min_fan_in=min_fan_in,
        grown=AT_REST,
        seed=seed,
    )
    most = _drop_and_grow.most_dropped(drop_fraction, overrides)
    return _transformation(inner, method, _ranking.by_gradient, most, min_fan_in, seed)


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

    No scores are needed: `rewire` takes zeros, as `probes` makes them.

    Args:
      inner: As in `rigl`, and so the others.
      end: As in `rigl`.
      every: As in `rigl`.
      begin: As in `rigl`.
      drop_fraction: As in `rigl`.
      overrides: As in `rigl`.
      min_fan_in: As in `rigl`.
      seed: Seeds the growth.

    Returns:
      A `CondensedTransformation`.

    Raises:
      ValueError: As `rigl`.
    """
    method = _drop_and_grow.drop_and_grow_method(
        _drop_and_grow.grow_at_random(seed),
        end=end,
        every=every,
        begin=begin,
        drop_fraction=drop_fraction,
        overrides=overrides,
        gradient_step=False,
        min_fan_in=min_fan_in,
        grown=AT_REST,
        seed=seed,
        needs_signal=False,
    )
    most = _drop_and_grow.most_dropped(drop_fraction, overrides)
    return _transformation(inner, method, _ranking.at_random(seed), most, min_fan_in, seed)


def static_sparse(inner: optax.GradientTransformation) -> CondensedTransformation:
    """Condensed weights whose topologies never change.

    Args:
      inner: Any Optax optimizer.

    Returns:
      A `CondensedTransformation`, whose `rewire` raises: no step is a rewiring step.

    Example:
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
    """Value and gradients of a loss of kernels, for ordinary steps.

    Args:
      loss: From the tree that `bind` makes, and any more arguments, to a scalar.

    Returns:
      A function of weights, topologies and those arguments to `(value, gradients)`.
    """

    def function(weights: PyTree, topologies: Topologies, *args: Any) -> tuple[jax.Array, PyTree]:
        def of_weights(weights: PyTree) -> jax.Array:
            return loss(_conversion.bind(weights, topologies), *args)

        return jax.value_and_grad(of_weights)(weights)

    return function


def value_grad_and_scores(
    loss: Loss,
) -> Callable[..., tuple[jax.Array, PyTree, dict[str, Any]]]:
    """As `value_and_grad`, and what growth needs to know of the dense gradient: to rewire.

    Of blocks the scores of all of them; of single weights a `Probe`, for the topologies of a state.
    """

    def function(
        weights: PyTree, topologies: Topologies, *args: Any
    ) -> tuple[jax.Array, PyTree, dict[str, Any]]:
        def of_both(weights: PyTree, probes: Mapping[str, Any]) -> jax.Array:
            return loss(_conversion.bind(weights, topologies, probes), *args)

        probes = _conversion.probes(topologies)
        value, (grads, scores) = jax.value_and_grad(of_both, (0, 1))(weights, probes)
        return value, grads, scores

    return function


def _transformation(
    inner: optax.GradientTransformation,
    method: Method | None,
    propose: Propose = _ranking.by_gradient,
    most_dropped: float = 1.0,
    min_fan_in: int = 0,
    seed: Seed | None = None,
) -> CondensedTransformation:
    if not callable(getattr(inner, "init", None)) or not callable(getattr(inner, "update", None)):
        raise TypeError(
            f"inner={inner!r}: must be an Optax transformation, as optax.sgd(0.1); it has no "
            "init and update"
        )
    if seed is not None:
        _random.check_seed(seed)
    inner = optax.with_extra_args_support(inner)
    told: list[int] = []  # of a missed rewiring, once
    plan = None if method is None else method.plan

    def init(weights: PyTree, topologies: Topologies) -> CondensedState:
        if not topologies:
            raise ValueError("topologies is empty: nothing is condensed")
        _conversion.check(weights, topologies)
        layout = _layout(weights, topologies)
        if method is not None:
            for leaf in layout.sparse:
                _ranking.check(topologies[leaf.path], leaf.path, min_fan_in)
        if plan is not None:
            plan.check([leaf.path for leaf in layout.sparse])
        if method is not None and method.check is not None:
            method.check(layout, layout)
        # Buffers of their own: a step that donates the state takes nothing of the caller's.
        return CondensedState(
            count=jnp.zeros((), jnp.int32),
            topologies={
                path: jax.tree.map(jnp.copy, _ranking.bounded(topology, most_dropped))
                for path, topology in topologies.items()
            },
            inner_state=inner.init(weights),
            rewirings=jnp.zeros((), jnp.int32),
            uninformed=jnp.zeros((), jnp.int32),
        )

    def update(
        grads: PyTree, state: CondensedState, weights: PyTree, **extra_args: Any
    ) -> tuple[PyTree, CondensedState]:
        is_known = not isinstance(state.count, jax.core.Tracer)
        if is_known and not told and is_rewiring_step(state.count):
            told.append(int(state.count))
            warnings.warn(f"update at count {told[0]}: {_MISSED}", stacklevel=2)
        updates, inner_state = inner.update(grads, state.inner_state, weights, **extra_args)
        count = optax.safe_increment(state.count)
        return updates, state._replace(count=count, inner_state=inner_state)

    def rewire(
        grads: PyTree,
        scores: Mapping[str, Any],
        state: CondensedState,
        weights: PyTree,
        **extra_args: Any,
    ) -> tuple[PyTree, CondensedState]:
        if method is None:
            raise ValueError("rewire: the topologies of static_sparse never change")
        # Blocks change places, and with them devices: no types can follow that.
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
        ranked = _ranked(layout, scores, state)
        inputs = _inputs(layout, ranked, state.count)
        # Where scores are zeros that nobody has asked for, the gradients of what is stored tell.
        named = zip(layout.paths, jax.tree.leaves(grads), strict=True)
        judged = [*jax.tree.leaves(scores), *(g for p, g in named if p in state.topologies)]
        is_accepted = _rewiring.total([~jnp.isfinite(x) for x in judged]) == 0
        for each in ranked:
            is_accepted = is_accepted & each.is_sound
        outcome = method.rule(inputs)
        chosen = inputs.packing.unpack(outcome.masks)
        moved = {
            leaf.path: _unless_refused(each.move(mask), state.topologies[leaf.path], is_accepted)
            for leaf, each, mask in zip(layout.sparse, ranked, chosen, strict=True)
        }

        def carried(tree: PyTree) -> PyTree:
            """Weights, or what is like them, where their blocks are now; 0 where new."""
            leaves = [
                moved[path].carry(leaf, jnp.zeros_like(leaf)) if path in moved else leaf
                for path, leaf in zip(layout.paths, jax.tree.leaves(tree), strict=True)
            ]
            return layout.treedef.unflatten(leaves)

        # The optimizer's counters go on, so that schedules stay aligned with the loop; one NaN
        # would poison for good what it averages over a layer.
        seen = jax.tree.map(lambda g: jnp.where(is_accepted, g, jnp.zeros_like(g)), grads)
        _, after = inner.update(seen, state.inner_state, weights, **extra_args)
        new_weights = carried(weights)
        left_out = jnp.zeros((), jnp.int32)
        if outcome.uninformed is not None:
            left_out = jnp.where(is_accepted, outcome.uninformed, 0)
        inner_state = _settled(layout, moved, state.inner_state, after, weights, inner, new_weights)
        return new_weights, CondensedState(
            count=optax.safe_increment(state.count),
            topologies={path: moved[path].topology for path in state.topologies},
            inner_state=inner_state,
            rewirings=_rewiring.saturating_add(state.rewirings, is_accepted.astype(jnp.int32)),
            uninformed=_rewiring.saturating_add(jnp.asarray(state.uninformed), left_out),
        )

    def _ranked(layout: Layout, scores: Mapping[str, Any], state: CondensedState) -> list[Ranked]:
        each = []
        for leaf in layout.sparse:
            topology, values = state.topologies[leaf.path], layout.leaves[leaf.position]
            seen = scores[leaf.path]
            if isinstance(topology, CSRTopology):
                proposal = propose(topology, seen, leaf.position, state.count)
                each.append(_ranking.of_weights(topology, values, proposal))
            else:
                each.append(_ranking.of_blocks(topology, values, seen))
        return each

    def is_rewiring_step(count: jax.typing.ArrayLike) -> jax.Array:
        count = jnp.asarray(count, jnp.int32)
        return jnp.zeros((), bool) if plan is None else plan.is_rewiring_step(count)

    def check(state: CondensedState) -> None:
        due = 0 if plan is None else plan.rewirings_before(int(state.count))
        if int(state.rewirings) < due:
            raise RuntimeError(
                f"{int(state.rewirings)} of the {due} rewirings due before count "
                f"{int(state.count)} have happened. {_MISSED} A rewiring also stays out where "
                "gradients or scores are not finite, or a kernel of single weights is not used "
                "exactly once in the loss."
            )

    return CondensedTransformation(init, update, rewire, is_rewiring_step, check, plan)


def _unless_refused(moved: Moved, old: Topology | CSRTopology, is_accepted: jax.Array) -> Moved:
    """As it was, if a rewiring is refused."""
    stay = Moved(old, jnp.arange(moved.source.size, dtype=jnp.int32), jnp.ones((), bool))
    return jax.tree.map(lambda new, old: jnp.where(is_accepted, new, old), moved, stay)


def _layout(weights: PyTree, topologies: Topologies) -> Layout:
    """As the masked form has it, with the condensed kernels for sparse leaves."""
    named = _paths.flatten_with_paths(weights)
    sparse = [
        _ranking.leaf(path, position, topologies[path])
        for position, (path, _) in enumerate(named)
        if path in topologies
    ]
    leaves, treedef = jax.tree.flatten(weights)
    return Layout(treedef, [path for path, _ in named], leaves, sparse)


def _inputs(layout: Layout, ranked: Sequence[Ranked], count: jax.Array) -> RewiringInputs:
    """Groups, in place of the weights that the rule knows."""
    packing = _packing.packing([leaf.grid for leaf in layout.sparse], [False] * len(ranked))
    return RewiringInputs(
        count=count,
        weights=packing.pack([each.weights for each in ranked], 0.0),
        gradients=packing.pack([each.gradients for each in ranked], 0.0),
        masks=packing.pack([each.mask for each in ranked], False),
        second_masks=[],
        numbers=(),
        packing=packing,
        leaves=layout.sparse,
        indices=packing.pack([each.indices for each in ranked], 0),
    )


def _settled(
    layout: Layout,
    moved: Mapping[str, Moved],
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
        stored[index] = moved[path].carry(slot.kept, slot.rest) if path in moved else slot.kept
    return _inner_state.replace_leaves(new, stored)
