"""The one Optax wrapper every method is made of."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from rigl_optax import _inner_state, _layout, _masks, _packing, _random, _replay, _selection
from rigl_optax._inner_state import Kept
from rigl_optax._packing import Packing
from rigl_optax._schedules import RewiringSchedule
from rigl_optax._state import SparseState

PyTree = Any


class RewiringInputs(NamedTuple):
    """What a method may look at when it rewires.

    The lists hold the sparse leaves as `packing` lays them out: side by side in one
    array, or apart; `packing.rows` says which layer each row belongs to.
    """

    count: jax.Array  # type: ignore[assignment]
    weights: list[jax.Array]  # float32
    gradients: list[jax.Array]  # float32, dense: as if there were no mask
    masks: list[jax.Array]  # bool
    packing: Packing
    leaves: Sequence[_layout.SparseLeaf]


# From these the new masks, laid out alike.
RewiringRule = Callable[[RewiringInputs], list[jax.Array]]


class _Rewired(NamedTuple):
    masks: list[jax.Array]
    healed: jax.Array  # int32: inactive weights that were not zero
    is_finite: jax.Array  # bool: whether the gradients could be ranked


def sparse_transform(
    inner: optax.GradientTransformation,
    sparsity: float | _layout.Distribution | None,
    *,
    schedule: RewiringSchedule | None,
    rule: RewiringRule,
    initial_masks: PyTree | None,
    seed: _random.Seed,
) -> optax.GradientTransformationExtraArgs:
    """Wraps `inner` so that the network it trains is sparse, exactly and always.

    Args:
      inner: The optimizer.
      sparsity: What the public methods take.
      schedule: When to rewire; None for never.
      rule: The new masks of a rewiring.
      initial_masks: What the public methods take.
      seed: What the public methods take.

    Returns:
      A transformation with a `SparseState`.
    """
    if not callable(getattr(inner, "init", None)) or not callable(getattr(inner, "update", None)):
        raise TypeError(
            f"inner={inner!r}: must be an Optax transformation, as optax.sgd(0.1); it has no "
            "init and update"
        )
    inner = optax.with_extra_args_support(inner)
    distribution = _layout.as_distribution(sparsity, initial_masks)
    _random.check_seed(seed)

    def init_fn(params: PyTree) -> SparseState:
        layout = _layout.layout(params, distribution, initial_masks is not None)
        if not layout.leaves:
            masks = []
        elif initial_masks is None:
            masks = _masks.random_masks(layout, seed)
        else:
            masks = _masks.copied_masks(layout, initial_masks)
        started: list[Any] = [
            leaf if isinstance(leaf, jax.ShapeDtypeStruct) else jnp.asarray(leaf)
            for leaf in layout.leaves
        ]
        for leaf in layout.sparse:
            if not isinstance(started[leaf.position], jax.ShapeDtypeStruct):
                started[leaf.position] = _masks.masked(masks[leaf.position], started[leaf.position])
        return SparseState(
            count=jnp.zeros((), jnp.int32),
            masks=layout.treedef.unflatten(masks),
            inner_state=inner.init(layout.treedef.unflatten(started)),
            rewirings=jnp.zeros((), jnp.int32),
            healed=jnp.zeros((), jnp.int32),
        )

    # Jitted, so that a call outside jit compiles the rewiring once, not at every step.
    @functools.partial(jax.jit, static_argnums=0)
    def rewire_if(
        sparse: Sequence[_layout.SparseLeaf],
        is_rewiring: jax.Array,
        count: jax.Array,
        weights: list[jax.Array],
        gradients: list[jax.Array],
        masks: list[jax.Array],
    ) -> _Rewired:
        packing = _packing.packing([m.shape for m in masks], [leaf.stacked for leaf in sparse])

        def rewire() -> _Rewired:
            # Padding is an inactive zero with no gradient: it counts for nothing.
            inputs = RewiringInputs(
                count=count,
                weights=packing.pack([w.astype(jnp.float32) for w in weights], 0.0),
                gradients=packing.pack([g.astype(jnp.float32) for g in gradients], 0.0),
                masks=packing.pack(masks, False),
                packing=packing,
                leaves=sparse,
            )
            is_finite = _total([~jnp.isfinite(g) for g in inputs.gradients]) == 0
            pairs = zip(rule(inputs), inputs.masks, strict=True)
            rewired = [jnp.where(is_finite, new, old) for new, old in pairs]
            alive = zip(inputs.weights, inputs.masks, strict=True)
            healed = _total([~mask & (weight != 0) for weight, mask in alive])
            return _Rewired(packing.unpack(rewired), healed, is_finite)

        def stay() -> _Rewired:
            return _Rewired(masks, jnp.zeros((), jnp.int32), jnp.array(True))

        return lax.cond(is_rewiring, rewire, stay)

    def update_fn(
        updates: PyTree, state: SparseState, params: PyTree | None = None, **extra_args: Any
    ) -> tuple[PyTree, SparseState]:
        if params is None:
            raise ValueError(
                "update needs params: call tx.update(grads, opt_state, params); weights are "
                "ranked, and inactive ones set to 0"
            )
        layout = _layout.layout(params, distribution, masked=True)
        treedef, weights, sparse = layout.treedef, layout.leaves, tuple(layout.sparse)
        gradients = treedef.flatten_up_to(updates)
        masks = treedef.flatten_up_to(state.masks)
        for path, mask, weight in zip(layout.paths, masks, weights, strict=True):
            if mask.shape != weight.shape:
                raise ValueError(
                    f"{path!r}: the state's mask has shape {mask.shape}, the parameter "
                    f"{weight.shape}; the state belongs to other params"
                )
        indices = [leaf.position for leaf in sparse]

        if schedule is None or not sparse:
            is_rewiring = has_rewired = has_failed = None
            new_masks, healed = masks, state.healed
        else:
            is_rewiring = schedule.is_rewiring_step(state.count)
            rewired = rewire_if(
                sparse,
                is_rewiring,
                state.count,
                layout.select(weights),
                layout.select(gradients),
                layout.select(masks),
            )
            new_masks = list(masks)
            for index, mask in zip(indices, rewired.masks, strict=True):
                new_masks[index] = mask
            healed = _saturating_add(state.healed, rewired.healed)
            has_failed = is_rewiring & ~rewired.is_finite
            has_rewired = is_rewiring & rewired.is_finite

        # Only masks came out of the cond: the rest is elementwise and fuses with `inner`.
        kept: list[Kept | None] = [None] * len(weights)
        seen, inputs_of_inner = list(weights), list(gradients)
        for index in indices:
            kept[index] = Kept(masks[index], new_masks[index])
            seen[index] = _masks.masked(masks[index], weights[index])
            inputs_of_inner[index] = _masks.masked(masks[index], gradients[index])
        if has_failed is not None:
            # One NaN would poison for good what an optimizer averages over a layer.
            inputs_of_inner = [_masks.masked(~has_failed, g) for g in inputs_of_inner]

        def inner_update() -> tuple[PyTree, PyTree]:
            return inner.update(
                treedef.unflatten(inputs_of_inner),
                state.inner_state,
                treedef.unflatten(seen),
                **extra_args,
            )

        steps, inner_state = inner_update()
        if is_rewiring is not None:
            started = [
                w if where is None else where.select(w, jnp.zeros_like(w))
                for w, where in zip(weights, kept, strict=True)
            ]
            rest = inner.init(treedef.unflatten(started))
            held = _inner_state.held_leaves(
                state.inner_state, inner_state, rest, params, kept, is_rewiring
            )
            steps = _replay.with_stored_state(inner_update, steps, held)
            inner_state = _inner_state.replace_leaves(inner_state, held)

        landed = [
            _land(step, weight, where, is_rewiring)
            for step, weight, where in zip(treedef.flatten_up_to(steps), weights, kept, strict=True)
        ]
        rewirings = state.rewirings
        if has_rewired is not None:
            rewirings = _saturating_add(rewirings, has_rewired.astype(jnp.int32))
        return treedef.unflatten(landed), SparseState(
            count=optax.safe_increment(state.count),
            masks=treedef.unflatten(new_masks),
            inner_state=inner_state,
            rewirings=rewirings,
            healed=healed,
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _land(
    step: jax.Array, weight: jax.Array, kept: Kept | None, is_rewiring: jax.Array | None
) -> jax.Array:
    """The update that leaves 0 wherever a weight was not active before and after."""
    with jax.numpy_dtype_promotion("standard"):
        dtype = jnp.result_type(step, weight)
    step = jnp.asarray(step).astype(dtype)
    if is_rewiring is not None:  # a rewiring replaces the gradient step
        step = _masks.masked(~is_rewiring, step)
    if kept is None:
        return step
    return kept.select(step, -jnp.asarray(weight).astype(dtype))


def _total(masks: Sequence[jax.Array]) -> jax.Array:
    """True entries of all masks, an int32 scalar that stays at its maximum."""
    total = jnp.zeros((), jnp.int32)
    for mask in masks:
        total = _saturating_add(total, _selection.count_true(mask))
    return total


def _saturating_add(a: jax.Array, b: jax.Array) -> jax.Array:
    return a + jnp.minimum(b, jnp.iinfo(jnp.int32).max - a)
