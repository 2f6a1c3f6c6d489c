"""A step of shadow weights, then new masks of them: the weights are those that show."""

import jax
import jax.numpy as jnp
import optax

from rigl_optax._ranking._packing import Packing
from rigl_optax._types import PyTree
from rigl_optax._wrapper import _inner_state, _memory, _rewiring
from rigl_optax._wrapper._call import Call, Leaves, Step, step_dtype
from rigl_optax._wrapper._method import RewiringInputs, Shadow
from rigl_optax._wrapper._rewiring import Rewire
from rigl_optax._xla import _blend, _replay


def step(shadow: Shadow, rewire_if: Rewire, call: Call) -> Step:
    """Moves the shadow, and renews the masks where it is time."""
    layout, state, is_rewiring = call.layout, call.state, call.is_rewiring
    assert is_rewiring is not None
    inputs = _inputs(shadow, call)
    is_finite = _rewiring.total([~jnp.isfinite(g) for g in inputs.gradients]) == 0
    has_failed = is_rewiring & ~is_finite
    weights, gradients = list(call.weights), list(call.gradients)
    each = zip(layout.sparse, inputs.weights, shadow.backward(inputs), strict=True)
    for leaf, hidden, gradient in each:
        weights[leaf.position], gradients[leaf.position] = hidden, gradient
    gradients = [_blend.masked(~has_failed, g) for g in gradients]
    params = layout.treedef.unflatten(call.weights)

    def inner_update() -> tuple[Leaves, PyTree]:
        return call.inner(gradients, weights)

    if shadow.resets:
        steps, inner_state = inner_update()
    else:
        # No weight starts anew; where a rewiring fails, nothing moves.
        steps, after, replayed = _replay.stepped(inner_update, gradients)
        stored = _inner_state.stored_leaves(
            _inner_state.slots(state.inner_state, after, after, params),
            [None] * len(weights),
            has_failed,
            has_failed,
            replaces_step=True,
        )
        steps, inner_state = replayed(stored), _inner_state.replace_leaves(after, stored)
    stepped = optax.apply_updates(weights, steps)

    def unless_failed(new: PyTree, old: PyTree) -> PyTree:
        return jax.tree.map(lambda n, o: jnp.where(has_failed, o, n), new, old)

    settled, numbers = unless_failed(
        shadow.settle(inputs, layout.select(stepped)), (inputs.weights, inputs.numbers)
    )
    for leaf, hidden in zip(layout.sparse, settled, strict=True):
        weights[leaf.position] = hidden
    to_rank = call.leaf_inputs(weights, visible=layout.select(call.weights))
    rewired = rewire_if(tuple(layout.sparse), is_rewiring, to_rank._replace(numbers=numbers))
    if shadow.resets:
        stored = _inner_state.stored_leaves(
            _inner_state.slots(state.inner_state, inner_state, call.at_rest(weights), params),
            call.kept(rewired),
            is_rewiring,
            has_failed,
            replaces_step=False,
        )
        inner_state = _inner_state.replace_leaves(inner_state, stored)
    updates = [
        _blend.masked(~has_failed, jnp.asarray(step).astype(step_dtype(step, weight)))
        for step, weight in zip(steps, call.weights, strict=True)
    ]
    forward = shadow.forward(settled, rewired.masks, rewired.numbers)
    for leaf, value in zip(layout.sparse, forward, strict=True):
        weight = call.weights[leaf.position]
        dtype = step_dtype(steps[leaf.position], weight)
        updates[leaf.position] = value.astype(dtype) - jnp.asarray(weight).astype(dtype)
    return Step(updates, inner_state, rewired, shadow=settled if shadow.stored else None)


def _inputs(shadow: Shadow, call: Call) -> RewiringInputs:
    """Collects what the method sees at every step: the leaves in their own shapes."""
    sparse, memory = call.layout.sparse, call.state.memory
    masks, weights = (call.layout.select(x) for x in (call.masks, call.weights))
    if shadow.stored:
        hidden = _memory.leaves(call.state.shadow)
    else:
        hidden = [_blend.masked(m, w) for m, w in zip(masks, weights, strict=True)]
    return RewiringInputs(
        count=call.state.count,
        weights=hidden,
        gradients=call.layout.select(call.gradients),
        masks=masks,
        second_masks=_memory.leaves(memory.second_masks),
        numbers=memory.numbers,
        packing=Packing(
            tuple(leaf.shape for leaf in sparse),
            tuple(int(leaf.stacked) for leaf in sparse),
            is_packed=False,
        ),
        leaves=sparse,
    )
