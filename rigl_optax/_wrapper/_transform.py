"""The one Optax wrapper every method is made of."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from rigl_optax import _layout, _masks, _structures
from rigl_optax._layout import Layout
from rigl_optax._ranking import _random
from rigl_optax._state import SparseState
from rigl_optax._structures import Structures
from rigl_optax._types import LayerSparsities, PyTree, Seed, Sparsity
from rigl_optax._wrapper import _inner_state, _memory, _narrow, _refusals, _rewiring
from rigl_optax._wrapper._design import Design, Layouts, SparseTransformation
from rigl_optax._wrapper._inner_state import Kept
from rigl_optax._wrapper._method import Method, Shadow, ShadowView
from rigl_optax._wrapper._rewiring import Rewire, Rewired, Sight
from rigl_optax._xla import _blend, _replay

Leaves = list[Any]


class _Call(NamedTuple):
    """One call of `update`, unpacked: lists have an entry for every leaf of params."""

    layout: Layout
    weights: Leaves
    gradients: Leaves
    masks: Leaves
    state: SparseState
    is_rewiring: jax.Array | None  # None if there never is one
    # From gradients and weights to updates and the new inner state.
    inner: Callable[[Leaves, Leaves], tuple[Leaves, PyTree]]
    at_rest: Callable[[Leaves], PyTree]  # from weights to a fresh inner state

    def sight(self, ranked: Leaves, **more: Any) -> Sight:
        """What a rewiring sees when it ranks these weights."""
        select = self.layout.select
        return Sight(
            count=self.state.count,
            weights=select(ranked),
            gradients=select(self.gradients),
            masks=select(self.masks),
            marks=_memory.leaves(self.state.memory.marks),
            carry=self.state.memory.carry,
            **more,
        )

    def kept(self, rewired: Rewired | None) -> list[Kept | None]:
        """For each leaf its old and new mask; None for dense leaves."""
        kept: list[Kept | None] = [None] * len(self.weights)
        for i, leaf in enumerate(self.layout.sparse):
            mask = self.masks[leaf.position]
            pair = (mask, mask) if rewired is None else (rewired.before[i], rewired.masks[i])
            kept[leaf.position] = Kept(*pair)
        return kept


class _Moved(NamedTuple):
    """What a call of `update` has come to."""

    updates: Leaves
    inner_state: PyTree
    rewired: Rewired | None
    remembered: Leaves | None = None
    shadow: Leaves | None = None


def sparse_transform(
    inner: optax.GradientTransformation,
    sparsity: Sparsity | None,
    method: Method,
    *,
    initial_masks: PyTree | None,
    seed: Seed,
    initial_sparsity: LayerSparsities | None = None,
    structure: Structures = _structures.UNSTRUCTURED,
) -> SparseTransformation:
    """Wraps `inner` so that the network it trains is sparse, exactly and always.

    Args:
      inner: The optimizer.
      sparsity: What the public methods take.
      method: What distinguishes this method from others.
      initial_masks: What the public methods take.
      seed: What the public methods take.
      initial_sparsity: Of the random masks at the start, where it is not `sparsity`.
      structure: What the public methods take.

    Returns:
      A transformation with a `SparseState`, and the design it was built from.
    """
    if not callable(getattr(inner, "init", None)) or not callable(getattr(inner, "update", None)):
        raise TypeError(
            f"inner={inner!r}: must be an Optax transformation, as optax.sgd(0.1); it has no "
            "init and update"
        )
    inner = optax.with_extra_args_support(inner)
    distribution = _layout.as_distribution(sparsity, initial_masks)
    _random.check_seed(seed)
    _structures.check(structure, method.ablates)
    rewire_if = _rewiring.rewirer(method)

    def layouts(params: PyTree) -> Layouts:
        _refusals.check_params(params)
        layout = _layout.layout(params, distribution, sparsity is None, structure)
        if method.plan is not None and layout.sparse:
            method.plan.check([leaf.path for leaf in layout.sparse])
        first = layout
        if initial_masks is not None and layout.leaves:
            first = _masks.counted(layout, initial_masks)
        elif initial_sparsity is not None:
            first = _layout.layout(params, initial_sparsity, False, structure)
            _layout.check_same_leaves(layout, first)
        if method.check is not None and layout.sparse:
            method.check(layout, first)
        return Layouts(first, layout)

    def init_fn(params: PyTree) -> SparseState:
        drawn, layout = layouts(params)
        if not layout.leaves:
            masks = []
        elif initial_masks is None:
            masks = _masks.random_masks(drawn, seed)
        else:
            masks = _masks.copied_masks(layout, initial_masks)
            if sparsity is None and method.plan is not None:
                _masks.warn_of_stacks(layout, initial_masks)
        started: list[Any] = [
            leaf if isinstance(leaf, jax.ShapeDtypeStruct) else jnp.asarray(leaf)
            for leaf in layout.leaves
        ]
        if method.shadow is None:
            for leaf in layout.sparse:
                if not isinstance(started[leaf.position], jax.ShapeDtypeStruct):
                    mask = masks[leaf.position]
                    started[leaf.position] = _blend.masked(mask, started[leaf.position])
        memory, shadow = _memory.start(method, layout, masks)
        inner_state = inner.init(layout.treedef.unflatten(started))
        _refusals.check_inner_state(inner_state)
        if method.plan is not None and method.shadow is None and layout.sparse:
            _refusals.check_frozen(inner.update, inner_state, layout)
        return SparseState(
            count=jnp.zeros((), jnp.int32),
            masks=layout.treedef.unflatten(masks),
            inner_state=inner_state,
            rewirings=jnp.zeros((), jnp.int32),
            healed=jnp.zeros((), jnp.int32),
            memory=memory,
            shadow=shadow,
            uninformed=jnp.zeros((), jnp.int32),
        )

    def update_fn(
        updates: PyTree, state: SparseState, params: PyTree | None = None, **extra_args: Any
    ) -> tuple[PyTree, SparseState]:
        if params is None:
            raise ValueError(
                "update needs params: call tx.update(grads, opt_state, params); weights are "
                "ranked, and inactive ones set to 0"
            )
        layout = _layout.layout(params, distribution, sparsity is None, structure)
        treedef = layout.treedef
        masks = treedef.flatten_up_to(state.masks)
        for path, mask, weight in zip(layout.paths, masks, layout.leaves, strict=True):
            if mask.shape != weight.shape:
                raise ValueError(
                    f"{path!r}: the state's mask has shape {mask.shape}, the parameter "
                    f"{weight.shape}; the state belongs to other params"
                )

        def inner_update(gradients: Leaves, weights: Leaves) -> tuple[Leaves, PyTree]:
            def stepped(
                gradients: Leaves, inner_state: PyTree, weights: Leaves
            ) -> tuple[Leaves, PyTree]:
                steps, inner_state = inner.update(
                    treedef.unflatten(gradients),
                    inner_state,
                    treedef.unflatten(weights),
                    **extra_args,
                )
                return treedef.flatten_up_to(steps), inner_state

            given = gradients, state.inner_state, weights
            if _narrow.is_narrow([*layout.select(gradients), *layout.select(weights)]):
                return _narrow.with_zero_quotients(stepped, *given)
            return stepped(*given)

        is_rewiring = None
        if method.plan is not None and layout.sparse:
            is_rewiring = method.plan.is_rewiring_step(state.count)
        call = _Call(
            layout=layout,
            weights=layout.leaves,
            gradients=_refusals.flat_gradients(layout, updates),
            masks=masks,
            state=state,
            is_rewiring=is_rewiring,
            inner=inner_update,
            at_rest=lambda leaves: inner.init(treedef.unflatten(leaves)),
        )
        if method.shadow is None or not layout.sparse:
            moved = _move_weights(method, rewire_if, call)
        else:
            moved = _move_shadow(method.shadow, rewire_if, call)

        masks, rewirings, healed = list(masks), state.rewirings, state.healed
        uninformed = jnp.asarray(state.uninformed)
        memory, rewired = state.memory, moved.rewired
        if rewired is not None and is_rewiring is not None:
            for leaf, mask in zip(layout.sparse, rewired.masks, strict=True):
                masks[leaf.position] = mask
            happened = (is_rewiring & rewired.is_finite).astype(jnp.int32)
            rewirings = _rewiring.saturating_add(rewirings, happened)
            healed = _rewiring.saturating_add(healed, rewired.healed)
            uninformed = _rewiring.saturating_add(uninformed, rewired.uninformed)
            memory = memory._replace(carry=rewired.carry)
            if rewired.marks:
                memory = memory._replace(marks=_memory.tree(layout, rewired.marks))
        if moved.remembered is not None:
            memory = memory._replace(gradients=_memory.tree(layout, moved.remembered))
        shadow = state.shadow
        if moved.shadow is not None:
            shadow = _memory.tree(layout, moved.shadow)
        return treedef.unflatten(moved.updates), SparseState(
            count=optax.safe_increment(state.count),
            masks=treedef.unflatten(masks),
            inner_state=moved.inner_state,
            rewirings=rewirings,
            healed=healed,
            memory=memory,
            shadow=shadow,
            uninformed=uninformed,
        )

    design = Design(method, distribution, layouts, initial_masks, seed)
    return SparseTransformation.of(init_fn, update_fn, design)


def _move_weights(method: Method, rewire_if: Rewire, call: _Call) -> _Moved:
    """A step of the weights themselves: those that are inactive are gone."""
    layout, state, is_rewiring = call.layout, call.state, call.is_rewiring
    rewired, remembered, has_failed = None, None, None
    if is_rewiring is not None:
        if method.remember is not None:
            gradients = layout.select(call.gradients)
            pairs = zip(_memory.leaves(state.memory.gradients), gradients, strict=True)
            remembered = [
                method.remember(state.count, old, g.astype(jnp.float32)) for old, g in pairs
            ]
        initial = _memory.leaves(state.memory.initial) if method.keeps_initial else None
        sight = call.sight(call.weights, remembered=remembered, initial=initial)
        rewired = rewire_if(tuple(layout.sparse), is_rewiring, sight)
        has_failed = is_rewiring & ~rewired.is_finite

    # Only masks came out of the cond, in place: the rest is elementwise and fuses with `inner`.
    kept = call.kept(rewired)
    seen, gradients = list(call.weights), list(call.gradients)
    for position, where in enumerate(kept):
        if where is not None:
            seen[position] = _blend.masked(where.old, seen[position])
            gradients[position] = _blend.masked(where.old, gradients[position])
    # One NaN would poison for good what an optimizer averages over a layer. Where nothing can fail
    # the selection stays, by what is always so: with it XLA repeats the masking in each kernel that
    # uses the gradient, without it writes the masked gradient out first, which takes longer.
    is_usable = state.count >= 0 if has_failed is None else ~has_failed
    gradients = [_blend.masked(is_usable, g) for g in gradients]

    def inner_update() -> tuple[Leaves, PyTree]:
        return call.inner(gradients, seen)

    if is_rewiring is not None and method.replaces_step:
        steps, inner_state, replayed = _replay.stepped(inner_update, gradients)
    else:
        steps, inner_state = inner_update()
    is_held = is_rewiring if method.replaces_step else has_failed
    if is_rewiring is not None and is_held is not None:
        resting = [
            w if where is None else where.select(w, jnp.zeros_like(w))
            for w, where in zip(call.weights, kept, strict=True)
        ]
        rest = call.at_rest(resting)
        params = layout.treedef.unflatten(call.weights)
        born = None
        if method.grown_state is not None:
            born = _memory.born(method.grown_state, layout, call.gradients, kept, is_rewiring)
        held = _inner_state.held_leaves(
            state.inner_state, inner_state, rest, params, kept, is_rewiring, is_held, born
        )
        if method.replaces_step:
            steps = replayed(held)
        inner_state = _inner_state.replace_leaves(inner_state, held)

    grown: list[jax.Array | None] = [None] * len(call.weights)
    if rewired is not None and rewired.grown is not None:
        for leaf, values in zip(layout.sparse, rewired.grown, strict=True):
            grown[leaf.position] = values
    is_taken = None if is_held is None else ~is_held
    updates = [
        _land(step, weight, where, value, is_taken)
        for step, weight, where, value in zip(steps, call.weights, kept, grown, strict=True)
    ]
    return _Moved(updates, inner_state, rewired, remembered)


def _move_shadow(shadow: Shadow, rewire_if: Rewire, call: _Call) -> _Moved:
    """A step of the shadow weights, then new masks of them: the weights are what shows."""
    layout, state, is_rewiring = call.layout, call.state, call.is_rewiring
    assert is_rewiring is not None
    view = ShadowView(
        count=state.count,
        shadow=_memory.leaves(state.shadow),
        gradients=layout.select(call.gradients),
        masks=layout.select(call.masks),
        marks=_memory.leaves(state.memory.marks),
        carry=state.memory.carry,
        leaves=layout.sparse,
    )
    is_finite = _rewiring.total([~jnp.isfinite(g) for g in view.gradients]) == 0
    has_failed = is_rewiring & ~is_finite
    weights, gradients = list(call.weights), list(call.gradients)
    pairs = zip(layout.sparse, view.shadow, shadow.backward(view), strict=True)
    for leaf, hidden, gradient in pairs:
        weights[leaf.position], gradients[leaf.position] = hidden, gradient
    gradients = [_blend.masked(~has_failed, g) for g in gradients]
    params = layout.treedef.unflatten(call.weights)

    def inner_update() -> tuple[Leaves, PyTree]:
        return call.inner(gradients, weights)

    if shadow.resets:
        steps, inner_state = inner_update()
    else:
        steps, after, replayed = _replay.stepped(inner_update, gradients)
        held = _inner_state.held_leaves(
            state.inner_state, after, after, params, [None] * len(weights), has_failed, has_failed
        )
        steps, inner_state = replayed(held), _inner_state.replace_leaves(after, held)
    stepped = optax.apply_updates(weights, steps)

    def unless_failed(new: PyTree, old: PyTree) -> PyTree:
        return jax.tree.map(lambda n, o: jnp.where(has_failed, o, n), new, old)

    settled, carry = unless_failed(
        shadow.settle(view, layout.select(stepped)), (view.shadow, view.carry)
    )
    for leaf, hidden in zip(layout.sparse, settled, strict=True):
        weights[leaf.position] = hidden
    sight = call.sight(weights, visible=layout.select(call.weights))
    rewired = rewire_if(tuple(layout.sparse), is_rewiring, sight._replace(carry=carry))
    if shadow.resets:
        resting = call.at_rest(weights)
        held = _inner_state.held_leaves(
            state.inner_state,
            inner_state,
            resting,
            params,
            call.kept(rewired),
            is_rewiring,
            has_failed,
        )
        inner_state = _inner_state.replace_leaves(inner_state, held)
    updates = [
        _blend.masked(~has_failed, jnp.asarray(step).astype(_step_dtype(step, weight)))
        for step, weight in zip(steps, call.weights, strict=True)
    ]
    forward = shadow.forward(settled, rewired.masks, rewired.carry)
    for leaf, value in zip(layout.sparse, forward, strict=True):
        weight = call.weights[leaf.position]
        dtype = _step_dtype(steps[leaf.position], weight)
        updates[leaf.position] = value.astype(dtype) - jnp.asarray(weight).astype(dtype)
    return _Moved(updates, inner_state, rewired, shadow=settled)


def _land(
    step: jax.Array,
    weight: jax.Array,
    kept: Kept | None,
    grown: jax.Array | None,
    is_taken: jax.Array | None,
) -> jax.Array:
    """The update that leaves 0 wherever a weight was not active before and after.

    Or the value that a new weight is to start from, where the method has one.
    """
    dtype = _step_dtype(step, weight)
    step = jnp.asarray(step).astype(dtype)
    if is_taken is not None:  # a rewiring replaces the gradient step
        step = _blend.masked(is_taken, step)
    if kept is None:
        return step
    away = -jnp.asarray(weight).astype(dtype)
    return kept.select(step, away, None if grown is None else grown.astype(dtype) + away)


def _step_dtype(step: jax.Array, weight: jax.Array) -> Any:
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(step, weight)
