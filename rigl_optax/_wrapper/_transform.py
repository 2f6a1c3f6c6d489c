"""The one Optax wrapper every method is made of."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from rigl_optax import _layout, _masks, _structures
from rigl_optax._layout import Layout
from rigl_optax._ranking import _random
from rigl_optax._state import SparseState
from rigl_optax._structures import Structures
from rigl_optax._types import LayerSparsities, PyTree, Seed, Sparsity
from rigl_optax._wrapper import _memory, _narrow, _refusals, _rewiring, _shadow_step, _step
from rigl_optax._wrapper._call import Call, Leaves, Step
from rigl_optax._wrapper._design import Design, Layouts, SparseTransformation
from rigl_optax._wrapper._method import Method
from rigl_optax._xla import _blend


def sparse_transform(
    inner: optax.GradientTransformation,
    sparsity: Sparsity | None,
    method: Method,
    *,
    initial_masks: PyTree | None = None,
    seed: Seed = 0,
    initial_sparsity: LayerSparsities | None = None,
    structure: Structures = _structures.UNSTRUCTURED,
) -> SparseTransformation:
    """Wraps `inner` so that the network it trains is sparse, exactly and always.

    Use it for a method of your own that `drop_and_grow` does not fit. The wrapper masks gradients
    and updates, calls the method's rule where its plan says, starts what is new at rest, heals
    what something else wrote into inactive weights, and counts.

    Args:
      inner: As in `rigl`.
      sparsity: As in `rigl`.
      method: What distinguishes this method from others.
      initial_masks: As in `rigl`.
      seed: As in `rigl`: it draws the initial masks.
      initial_sparsity: Distribution of the random initial masks, where it is not `sparsity`.
      structure: As in `rigl`.

    Returns:
      A transformation with a `SparseState`.

    Raises:
      TypeError, ValueError: As `rigl` does.

    Examples:
      A network whose masks never change:

      >>> import jax.numpy as jnp, optax, rigl_optax
      >>> method = rigl_optax.Method(
      ...     plan=None, rule=lambda inputs: rigl_optax.Decision(inputs.masks))
      >>> tx = rigl_optax.sparse_transform(optax.sgd(0.1), 0.9, method)
      >>> int(rigl_optax.get_masks(tx.init({"kernel": jnp.ones((10, 10))}))["kernel"].sum())
      10
    """
    if not callable(getattr(inner, "init", None)) or not callable(getattr(inner, "update", None)):
        raise TypeError(
            f"inner={inner!r}: must be an Optax transformation, as optax.sgd(0.1); it has no "
            "init and update"
        )
    inner = optax.with_extra_args_support(inner)
    distribution = _layout.as_distribution(sparsity, initial_masks)
    _random.check_seed(seed)
    _structures.check(structure, method.ablates, method.transposes)
    rewire_if = _rewiring.rewirer(method)

    def layouts(params: PyTree) -> Layouts:
        """Checks the parameters, and lays them out."""
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
        return Layouts(first, layout if method.final is None else method.final(layout))

    def first_masks(first: Layout, layout: Layout) -> Leaves:
        if not layout.leaves:
            return []
        if initial_masks is None:
            return _masks.random_masks(first, seed)
        if sparsity is None and method.plan is not None:
            _masks.warn_of_stacks(layout, initial_masks)
        return _masks.copied_masks(layout, initial_masks)

    def init_fn(params: PyTree) -> SparseState:
        # Masks are drawn with the numbers that a method begins with, but the state has the layout
        # that `update` finds again from params alone.
        first = layouts(params).first
        layout = _layout.layout(params, distribution, sparsity is None, structure)
        masks = first_masks(first, layout)
        memory, shadow = _memory.start(method, layout, masks)
        inner_state = inner.init(_seen_by_inner(method, layout, masks))
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
        _refusals.check_params_given(params)
        layout = _layout.layout(params, distribution, sparsity is None, structure)
        is_rewiring = None
        if method.plan is not None and layout.sparse:
            is_rewiring = method.plan.is_rewiring_step(state.count)
        call = Call(
            layout=layout,
            weights=layout.leaves,
            gradients=_refusals.flat_gradients(layout, updates),
            masks=_refusals.flat_masks(layout, state.masks),
            state=state,
            is_rewiring=is_rewiring,
            inner=_inner_update(inner, layout, state.inner_state, extra_args),
            at_rest=lambda leaves: inner.init(layout.treedef.unflatten(leaves)),
        )
        if method.shadow is None or not layout.sparse:
            step = _step.step(method, rewire_if, call)
        else:
            step = _shadow_step.step(method.shadow, rewire_if, call)
        return layout.treedef.unflatten(step.updates), _next_state(method, call, step)

    design = Design(method, distribution, layouts, initial_masks, seed)
    return SparseTransformation.of(init_fn, update_fn, design)


def _seen_by_inner(method: Method, layout: Layout, masks: Leaves) -> PyTree:
    """Returns the parameters that `inner` is initialised with: masked, unless a shadow lives on."""
    leaves: Leaves = [
        leaf if isinstance(leaf, jax.ShapeDtypeStruct) else jnp.asarray(leaf)
        for leaf in layout.leaves
    ]
    if method.shadow is None or not method.shadow.stored:
        positions = [leaf.position for leaf in layout.sparse]
        found = [i for i in positions if not isinstance(leaves[i], jax.ShapeDtypeStruct)]
        masked = _masked_leaves([masks[i] for i in found], [leaves[i] for i in found])
        for i, leaf in zip(found, masked, strict=True):
            leaves[i] = leaf
    return layout.treedef.unflatten(leaves)


# Outside jit, a program of its own for each shape would take longer to compile than one for all.
@functools.partial(jax.jit, inline=True)
def _masked_leaves(masks: Leaves, leaves: Leaves) -> Leaves:
    return [_blend.masked(mask, leaf) for mask, leaf in zip(masks, leaves, strict=True)]


def _inner_update(
    inner: optax.GradientTransformationExtraArgs,
    layout: Layout,
    inner_state: PyTree,
    extra_args: dict[str, Any],
) -> Any:
    """Makes `inner_update(gradients, weights) -> (steps, new inner state)`, of flat leaves."""
    treedef = layout.treedef

    def of_leaves(gradients: Leaves, inner_state: PyTree, weights: Leaves) -> tuple[Leaves, PyTree]:
        trees = treedef.unflatten(gradients), inner_state, treedef.unflatten(weights)
        steps, inner_state = inner.update(*trees, **extra_args)
        return treedef.flatten_up_to(steps), inner_state

    def inner_update(gradients: Leaves, weights: Leaves) -> tuple[Leaves, PyTree]:
        if _narrow.is_narrow([*layout.select(gradients), *layout.select(weights)]):
            return _narrow.with_zero_quotients(of_leaves, gradients, inner_state, weights)
        return of_leaves(gradients, inner_state, weights)

    return inner_update


def _next_state(method: Method, call: Call, step: Step) -> SparseState:
    layout, state, rewired = call.layout, call.state, step.rewired
    masks, memory, shadow = list(call.masks), state.memory, state.shadow
    rewirings, healed, uninformed = state.rewirings, state.healed, jnp.asarray(state.uninformed)
    if rewired is not None and call.is_rewiring is not None:
        for leaf, mask in zip(layout.sparse, rewired.masks, strict=True):
            masks[leaf.position] = mask
        happened = (call.is_rewiring & rewired.is_finite).astype(jnp.int32)
        rewirings = _rewiring.saturating_add(rewirings, happened)
        healed = _rewiring.saturating_add(healed, rewired.healed)
        uninformed = _rewiring.saturating_add(uninformed, rewired.uninformed)
        memory = memory._replace(numbers=rewired.numbers)
        if rewired.second_masks:
            memory = memory._replace(second_masks=_memory.tree(layout, rewired.second_masks))
    if step.remembered is not None:
        memory = memory._replace(gradients=_memory.tree(layout, step.remembered))
    if method.snapshot is not None and layout.sparse:
        params = layout.treedef.unflatten(call.weights)
        snapshot = _memory.taken(method.snapshot(state.count), params, memory.snapshot)
        memory = memory._replace(snapshot=snapshot)
    if step.shadow is not None:
        shadow = _memory.tree(layout, step.shadow)
    return SparseState(
        count=optax.safe_increment(state.count),
        masks=layout.treedef.unflatten(masks),
        inner_state=step.inner_state,
        rewirings=rewirings,
        healed=healed,
        memory=memory,
        shadow=shadow,
        uninformed=uninformed,
    )
