"""The rewiring of all sparse leaves at once, under `lax.cond`: masks come out, and what changed."""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

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


class Sight(NamedTuple):
    """What a rewiring needs to see; lists of the sparse leaves in their shapes."""

    count: jax.Array  # type: ignore[assignment]
    weights: Arrays  # those that are ranked
    gradients: Arrays  # dense, of this call
    masks: Arrays
    marks: Arrays
    remembered: Arrays | None = None  # of gradients, if the method remembers any
    initial: Arrays | None = None  # weights at init, if the method keeps them
    visible: Arrays | None = None  # weights of the forward pass, if others are ranked
    carry: PyTree = ()


class Rewired(NamedTuple):
    """What comes out of a rewiring, in the shapes of the leaves."""

    masks: Arrays
    before: Arrays  # the masks until now
    marks: Arrays
    carry: PyTree
    grown: Arrays | None  # float32: values of new weights; None for 0
    healed: jax.Array  # int32: inactive weights that were not zero
    is_finite: jax.Array  # bool: whether the gradients could be ranked
    uninformed: jax.Array  # int32: layers that stayed, as no score said where to grow


Rewire = Callable[[Sequence[SparseLeaf], jax.Array, Sight], Rewired]


def rewirer(method: Method) -> Rewire:
    """A function of the sparse leaves (static), whether to rewire, and what there is to see.

    It is jitted, so that a call outside jit compiles the rewiring once, not at every step.
    """

    @functools.partial(jax.jit, static_argnums=0)
    def rewire_if(sparse: Sequence[SparseLeaf], is_rewiring: jax.Array, sight: Sight) -> Rewired:
        # Of the weights; the method ranks groups of them.
        whole = _packing.packing([leaf.shape for leaf in sparse], [leaf.stacked for leaf in sparse])
        rewired, changed = lax.cond(
            is_rewiring,
            lambda: _rewire(method, sparse, sight, whole),
            lambda: _stay(method, sight, whole),
        )
        return rewired._replace(before=_before(is_rewiring, sight.masks, rewired.masks, changed))

    return rewire_if


def _before(is_rewiring: jax.Array, old: Arrays, new: Arrays, changed: Arrays) -> Arrays:
    """The masks until now, so that XLA need not keep them.

    New masks are written over the old ones. Whoever looks at the old ones after that makes XLA
    copy them first, at every step, into memory that is new to the process. What changed takes a
    bit a weight instead, and as on an ordinary step that is nothing, loops do not read it then.
    """
    if not changed:
        return old
    pairs = zip(new, changed, strict=True)
    return [lax.select(is_rewiring, n ^ _bits.unpack(c, n.shape), n) for n, c in pairs]


def _stay(method: Method, sight: Sight, whole: Packing) -> tuple[Rewired, Arrays]:
    grown = None
    if method.grown_values is not None:
        grown = [jnp.zeros_like(w, jnp.float32) for w in sight.weights]
    zero = jnp.zeros((), jnp.int32)
    changed = []
    if whole.is_packed:
        changed = [jnp.zeros(_bits.shape_of(m.shape), jnp.uint8) for m in sight.masks]
    finite = jnp.array(True)
    rewired = Rewired(sight.masks, [], sight.marks, sight.carry, grown, zero, finite, zero)
    return rewired, changed


def _inputs(sparse: Sequence[SparseLeaf], sight: Sight, packing: Packing) -> RewiringInputs:
    """What there is to see, laid out for ranking."""

    def as_float(leaves: Arrays) -> Arrays:
        # Padding is an inactive zero with no gradient: it counts for nothing.
        return packing.pack([x.astype(jnp.float32) for x in leaves], 0.0)

    ranked = sight.gradients if sight.remembered is None else sight.remembered
    return RewiringInputs(
        count=sight.count,
        weights=as_float(sight.weights),
        gradients=as_float(ranked),
        masks=packing.pack(sight.masks, False),
        marks=packing.pack(sight.marks, False) if sight.marks else [],
        carry=sight.carry,
        packing=packing,
        leaves=sparse,
    )


def _pooled(sparse: Sequence[SparseLeaf], sight: Sight) -> Sight:
    """The groups of all leaves, in place of their weights."""

    def pool(leaves: Arrays) -> Arrays:
        return [leaf.pool(x) for leaf, x in zip(sparse, leaves, strict=True)]

    def groups(masks: Arrays) -> Arrays:
        return [leaf.groups(m) for leaf, m in zip(sparse, masks, strict=True)]

    return sight._replace(
        weights=pool(sight.weights),
        gradients=pool(sight.gradients),
        masks=groups(sight.masks),
        marks=groups(sight.marks) if sight.marks else [],
        remembered=None if sight.remembered is None else pool(sight.remembered),
    )


def _rewire(
    method: Method, sparse: Sequence[SparseLeaf], sight: Sight, whole: Packing
) -> tuple[Rewired, Arrays]:
    """What comes out of a rewiring, and the bits of what changed where leaves are packed."""
    # The method ranks groups; values of single weights are looked at only for what is new.
    single = inputs = _inputs(sparse, sight, whole)
    if any(leaf.structure != _structures.UNSTRUCTURED for leaf in sparse):
        inputs = _inputs(sparse, _pooled(sparse, sight), _layout.packing(sparse))

    def expanded(masks: Arrays) -> Arrays:
        leaves = inputs.packing.unpack(masks)
        each = zip(sparse, leaves, sight.masks, strict=True)
        return [_sharding.like(leaf.expand(m), old) for leaf, m, old in each]

    def as_float(leaves: Arrays) -> Arrays:
        return single.packing.pack([x.astype(jnp.float32) for x in leaves], 0.0)

    judged = single.gradients
    if sight.remembered is not None:
        judged = judged + as_float(sight.gradients)
    is_finite = total([~jnp.isfinite(g) for g in judged]) == 0

    def accepted(new: PyTree, old: PyTree) -> PyTree:
        return jax.tree.map(lambda n, o: jnp.where(is_finite, n, o), new, old)

    outcome = method.rule(inputs)
    masks = accepted(outcome.masks, inputs.masks)
    marks = sight.marks
    if outcome.marks is not None:
        marks = expanded(accepted(outcome.marks, inputs.marks))
    carry = sight.carry if outcome.carry is None else accepted(outcome.carry, sight.carry)
    grown = None
    if method.grown_values is not None:
        values = single.packing.unpack(method.grown_values(single, sight.initial or []))
        grown = [_sharding.like(x, w) for x, w in zip(values, sight.weights, strict=True)]
    visible = single.weights if sight.visible is None else as_float(sight.visible)
    alive = zip(visible, single.masks, strict=True)
    healed = total([~mask & (weight != 0) for weight, mask in alive])
    changed = []
    if whole.is_packed:
        # From the packed masks, which are copies: the leaves are overwritten by the new ones.
        pairs = zip(masks, inputs.masks, strict=True)
        changed = [_bits.pack(c) for c in expanded([new ^ old for new, old in pairs])]
    uninformed = jnp.zeros((), jnp.int32)
    if outcome.uninformed is not None:
        uninformed = accepted(outcome.uninformed, uninformed)
    rewired = Rewired(expanded(masks), [], marks, carry, grown, healed, is_finite, uninformed)
    return rewired, changed


def total(masks: Sequence[jax.Array]) -> jax.Array:
    """True entries of all masks, an int32 scalar that stays at its maximum."""
    count = jnp.zeros((), jnp.int32)
    for mask in masks:
        count = saturating_add(count, _top_k.count_true(mask))
    return count


def saturating_add(a: jax.Array, b: jax.Array) -> jax.Array:
    """`a + b` for non-negative int32, at most the largest int32."""
    return a + jnp.minimum(b, jnp.iinfo(jnp.int32).max - a)
