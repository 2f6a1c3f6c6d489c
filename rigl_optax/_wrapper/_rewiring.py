"""The rewiring of all sparse leaves at once, under `lax.cond`: masks come out, and what changed."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from rigl_optax import _layout, _structures
from rigl_optax._layout import SparseLeaf
from rigl_optax._ranking import _packing, _top_k
from rigl_optax._ranking._packing import Packing
from rigl_optax._types import Arrays, PyTree
from rigl_optax._wrapper._method import Method, RewiringInputs
from rigl_optax._xla import _bits, _sharding


class LeafInputs(NamedTuple):
    """What `RewiringInputs` are made from: lists of the sparse leaves in their own shapes."""

    count: jax.Array  # type: ignore[assignment]
    weights: Arrays  # those that are ranked
    gradients: Arrays  # dense, of this call
    masks: Arrays
    second_masks: Arrays
    remembered: Arrays | None = None  # of gradients, if the method remembers any
    initial: Arrays | None = None  # weights at init, if the method keeps them
    visible: Arrays | None = None  # weights of the forward pass, if others are ranked
    numbers: PyTree = ()


class Rewired(NamedTuple):
    """What comes out of a rewiring, in the shapes of the leaves."""

    masks: Arrays
    before: Arrays  # the masks until now
    second_masks: Arrays
    numbers: PyTree
    newborn_values: Arrays | None  # float32; None for 0
    healed: jax.Array  # int32: inactive weights that were not zero
    is_finite: jax.Array  # bool: whether the gradients could be ranked
    uninformed: jax.Array  # int32: layers that stayed, as no score said where to grow


# rewire_if(sparse leaves, is_rewiring, inputs) -> Rewired
Rewire: TypeAlias = Callable[[Sequence[SparseLeaf], jax.Array, LeafInputs], Rewired]

# All of `Rewired` but the masks until now; and for each leaf one bit a weight, changed or not.
_Branch: TypeAlias = tuple[tuple[Any, ...], Arrays]


def rewirer(method: Method) -> Rewire:
    """Makes `rewire_if(sparse leaves, is_rewiring, inputs)`; the leaves are static.

    It is jitted, so that a call outside jit compiles the rewiring once, not at every step.
    """

    @functools.partial(jax.jit, static_argnums=0)
    def rewire_if(
        sparse: Sequence[SparseLeaf], is_rewiring: jax.Array, inputs: LeafInputs
    ) -> Rewired:
        # Of the weights; the method ranks groups of them.
        whole = _packing.packing([leaf.shape for leaf in sparse], [leaf.stacked for leaf in sparse])
        (masks, *rest), changed = lax.cond(
            is_rewiring,
            lambda: _rewire(method, sparse, inputs, whole),
            lambda: _stay(method, inputs, whole),
        )
        return Rewired(masks, _before(is_rewiring, inputs.masks, masks, changed), *rest)

    return rewire_if


def _before(is_rewiring: jax.Array, old: Arrays, new: Arrays, changed: Arrays) -> Arrays:
    """Rebuilds the masks until now from the new ones and from which entries changed.

    New masks overwrite the old buffers, and reading the old ones afterwards makes XLA copy all
    masks at every step, into memory that is new to the process. Instead the rewiring returns one
    bit per weight, changed or not. On an ordinary step nothing has changed, and loops do not read
    the bits.
    """
    if not changed:
        return old
    pairs = zip(new, changed, strict=True)
    return [lax.select(is_rewiring, n ^ _bits.unpack(c, n.shape), n) for n, c in pairs]


def _stay(method: Method, inputs: LeafInputs, whole: Packing) -> _Branch:
    newborn_values = None
    if method.grown_values is not None:
        newborn_values = [jnp.zeros_like(w, jnp.float32) for w in inputs.weights]
    zero = jnp.zeros((), jnp.int32)
    changed = []
    if whole.is_packed:
        changed = [jnp.zeros(_bits.shape_of(m.shape), jnp.uint8) for m in inputs.masks]
    finite = jnp.array(True)
    same = (inputs.masks, inputs.second_masks, inputs.numbers)
    return (*same, newborn_values, zero, finite, zero), changed


def _packed(sparse: Sequence[SparseLeaf], inputs: LeafInputs, packing: Packing) -> RewiringInputs:
    """Lays the inputs out for ranking."""

    def as_float(leaves: Arrays) -> Arrays:
        # Padding is an inactive zero with no gradient: it counts for nothing.
        return packing.pack([x.astype(jnp.float32) for x in leaves], 0.0)

    ranked = inputs.gradients if inputs.remembered is None else inputs.remembered
    return RewiringInputs(
        count=inputs.count,
        weights=as_float(inputs.weights),
        gradients=as_float(ranked),
        masks=packing.pack(inputs.masks, False),
        second_masks=packing.pack(inputs.second_masks, False) if inputs.second_masks else [],
        numbers=inputs.numbers,
        packing=packing,
        leaves=sparse,
    )


def _pooled(sparse: Sequence[SparseLeaf], inputs: LeafInputs) -> LeafInputs:
    """Puts groups in the place of weights."""

    def pool(leaves: Arrays) -> Arrays:
        return [leaf.pool(x) for leaf, x in zip(sparse, leaves, strict=True)]

    def groups(masks: Arrays) -> Arrays:
        return [leaf.groups(m) for leaf, m in zip(sparse, masks, strict=True)]

    return inputs._replace(
        weights=pool(inputs.weights),
        gradients=pool(inputs.gradients),
        masks=groups(inputs.masks),
        second_masks=groups(inputs.second_masks) if inputs.second_masks else [],
        remembered=None if inputs.remembered is None else pool(inputs.remembered),
    )


def _rewire(
    method: Method, sparse: Sequence[SparseLeaf], leaves: LeafInputs, whole: Packing
) -> _Branch:
    # The method ranks groups; values of single weights are looked at only for what is new.
    single = inputs = _packed(sparse, leaves, whole)
    if any(leaf.structure != _structures.UNSTRUCTURED for leaf in sparse):
        inputs = _packed(sparse, _pooled(sparse, leaves), _layout.packing(sparse))

    def expanded(masks: Arrays) -> Arrays:
        each = zip(sparse, inputs.packing.unpack(masks), leaves.masks, strict=True)
        return [_sharding.like(leaf.expand(m), old) for leaf, m, old in each]

    def as_float(leaves: Arrays) -> Arrays:
        return single.packing.pack([x.astype(jnp.float32) for x in leaves], 0.0)

    # What is remembered may be finite where this call's gradient, which `inner` sees, is not.
    must_be_finite = single.gradients
    if leaves.remembered is not None:
        must_be_finite = must_be_finite + as_float(leaves.gradients)
    is_finite = total([~jnp.isfinite(g) for g in must_be_finite]) == 0

    def unless_failed(new: PyTree, old: PyTree) -> PyTree:
        return jax.tree.map(lambda n, o: jnp.where(is_finite, n, o), new, old)

    decision = method.rule(inputs)
    # Not `where`: XLA would compute the new masks again in the kernel of each leaf, which takes
    # longer to compile (`benchmarks/update_overhead.py` prints the seconds).
    masks = lax.cond(is_finite, lambda: decision.masks, lambda: inputs.masks)
    second_masks, numbers = leaves.second_masks, leaves.numbers
    if decision.second_masks is not None:
        second_masks = expanded(unless_failed(decision.second_masks, inputs.second_masks))
    if decision.numbers is not None:
        numbers = unless_failed(decision.numbers, leaves.numbers)
    newborn_values = None
    if method.grown_values is not None:
        values = single.packing.unpack(method.grown_values(single, leaves.initial or []))
        newborn_values = [_sharding.like(x, w) for x, w in zip(values, leaves.weights, strict=True)]
    # Self-healing is about what the forward pass sees, of which shadow weights are not a part.
    visible = single.weights if leaves.visible is None else as_float(leaves.visible)
    healed = total([~m & (w != 0) for w, m in zip(visible, single.masks, strict=True)])
    changed = []
    if whole.is_packed:
        # From the packed masks, which are copies: the leaves are overwritten by the new ones.
        pairs = zip(masks, inputs.masks, strict=True)
        changed = [_bits.pack(c) for c in expanded([new ^ old for new, old in pairs])]
    uninformed = jnp.zeros((), jnp.int32)
    if decision.uninformed is not None:
        uninformed = unless_failed(decision.uninformed, uninformed)
    masks = expanded(masks)
    return (masks, second_masks, numbers, newborn_values, healed, is_finite, uninformed), changed


def total(masks: Sequence[jax.Array]) -> jax.Array:
    """Counts the True entries of all masks, an int32 scalar that stays at its maximum."""
    count = jnp.zeros((), jnp.int32)
    for mask in masks:
        count = saturating_add(count, _top_k.count_true(mask))
    return count


def saturating_add(a: jax.Array, b: jax.Array) -> jax.Array:
    """Adds non-negative int32; the sum stays at the largest int32."""
    return a + jnp.minimum(b, jnp.iinfo(jnp.int32).max - a)
