"""A step of the weights themselves: those that are inactive are gone."""

import jax
import jax.numpy as jnp

from rigl_optax._types import PyTree
from rigl_optax._wrapper import _inner_state, _memory
from rigl_optax._wrapper._call import Call, Leaves, Step, step_dtype
from rigl_optax._wrapper._inner_state import Kept
from rigl_optax._wrapper._method import Method
from rigl_optax._wrapper._rewiring import Rewire, Rewired
from rigl_optax._xla import _blend, _replay


def step(method: Method, rewire_if: Rewire, call: Call) -> Step:
    """Rewires where it is time, and moves the active weights where it is not."""
    layout, state, is_rewiring = call.layout, call.state, call.is_rewiring
    rewired, remembered, has_failed = None, None, None
    if is_rewiring is not None:
        remembered = _remembered(method, call)
        initial = _memory.leaves(state.memory.initial) if method.keeps_initial else None
        inputs = call.leaf_inputs(call.weights, remembered=remembered, initial=initial)
        rewired = rewire_if(tuple(layout.sparse), is_rewiring, inputs)
        has_failed = is_rewiring & ~rewired.is_finite

    # Only masks came out of the cond, in place: the rest is elementwise and fuses with `inner`.
    kept = call.kept(rewired)
    weights, gradients = list(call.weights), list(call.gradients)
    for position, where in enumerate(kept):
        if where is not None:
            weights[position] = _blend.masked(where.old, weights[position])
            gradients[position] = _blend.masked(where.old, gradients[position])
    # A NaN would stay in the optimizer's averages for ever, so a failed rewiring gives `inner`
    # zeros. Where no rewiring can fail we still select, on a condition that is always true: it
    # keeps XLA from writing out the masked gradient.
    is_usable = state.count >= 0 if has_failed is None else ~has_failed
    gradients = [_blend.masked(is_usable, g) for g in gradients]

    def inner_update() -> tuple[Leaves, PyTree]:
        return call.inner(gradients, weights)

    if is_rewiring is not None and method.replaces_step:
        steps, inner_state, replayed = _replay.stepped(inner_update, gradients)
    else:
        steps, inner_state = inner_update()
    if is_rewiring is not None and has_failed is not None:
        stored = _stored(method, call, kept, inner_state, has_failed)
        if method.replaces_step:
            steps = replayed(stored)
        inner_state = _inner_state.replace_leaves(inner_state, stored)

    is_taken = None
    if is_rewiring is not None and has_failed is not None:
        is_taken = ~(is_rewiring if method.replaces_step else has_failed)
    newborn = _newborn_values(call, rewired)
    updates = [
        _update(step, weight, where, value, is_taken)
        for step, weight, where, value in zip(steps, call.weights, kept, newborn, strict=True)
    ]
    return Step(updates, inner_state, rewired, remembered)


def _remembered(method: Method, call: Call) -> Leaves | None:
    """Computes what the method remembers of the gradients, this call's included."""
    if method.remember is None:
        return None
    gradients = call.layout.select(call.gradients)
    pairs = zip(_memory.leaves(call.state.memory.gradients), gradients, strict=True)
    return [method.remember(call.state.count, old, g.astype(jnp.float32)) for old, g in pairs]


def _stored(
    method: Method,
    call: Call,
    kept: list[Kept | None],
    inner_state: PyTree,
    has_failed: jax.Array,
) -> dict[int, jax.Array]:
    """Computes the leaves of the inner state that a rewiring changes."""
    assert call.is_rewiring is not None
    resting = [
        w if where is None else where.select(w, jnp.zeros_like(w))
        for w, where in zip(call.weights, kept, strict=True)
    ]
    rest = call.at_rest(resting)
    newborn_state = None
    if method.grown_state is not None:
        newborn_state = _memory.newborn_state(
            method.grown_state, call.layout, call.gradients, kept, call.is_rewiring
        )
    starts_anew = None
    if method.resets_state is not None:
        starts_anew = method.resets_state(call.state.count)
    params = call.layout.treedef.unflatten(call.weights)
    return _inner_state.stored_leaves(
        _inner_state.slots(call.state.inner_state, inner_state, rest, params),
        kept,
        call.is_rewiring,
        has_failed,
        replaces_step=method.replaces_step,
        newborn_state=newborn_state,
        starts_anew=starts_anew,
    )


def _newborn_values(call: Call, rewired: Rewired | None) -> list[jax.Array | None]:
    """Returns for each leaf the values that new weights start at; None for 0."""
    values: list[jax.Array | None] = [None] * len(call.weights)
    if rewired is not None and rewired.newborn_values is not None:
        for leaf, value in zip(call.layout.sparse, rewired.newborn_values, strict=True):
            values[leaf.position] = value
    return values


def _update(
    step: jax.Array,
    weight: jax.Array,
    kept: Kept | None,
    newborn: jax.Array | None,
    is_taken: jax.Array | None,
) -> jax.Array:
    """Makes the update after which a weight is 0 unless it was active before and is after.

    Or the value that a new weight is to start from, where the method has one.
    """
    dtype = step_dtype(step, weight)
    step = jnp.asarray(step).astype(dtype)
    if is_taken is not None:  # a rewiring replaces the gradient step
        step = _blend.masked(is_taken, step)
    if kept is None:
        return step
    # `apply_updates` adds: minus the weight gives exactly 0, whatever was written into it.
    to_zero = -jnp.asarray(weight).astype(dtype)
    return kept.select(step, to_zero, None if newborn is None else newborn.astype(dtype) + to_zero)
