"""Masks chosen once, before training: SNIP, GraSP, SynFlow, and by magnitude."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from rigl_optax import _layout, _numbers, _paths, _structures
from rigl_optax._layout import Layout, SparseLeaf
from rigl_optax._ranking import _top_k
from rigl_optax._ranking._packing import Packing
from rigl_optax._structures import UNSTRUCTURED, Structures
from rigl_optax._types import PyTree, Sparsity
from rigl_optax._xla import _sharding

Scope = Literal["layer", "global"]
Loss = Callable[[PyTree, Any], jax.Array]
Leaves = list[jax.Array]


class _Choice(NamedTuple):
    """What was chosen in each layer of a leaf, of how many, and their range; int32 [layers]."""

    kept: jax.Array
    of: jax.Array
    lowest: jax.Array
    highest: jax.Array


def magnitude_masks(
    params: PyTree,
    sparsity: Sparsity,
    *,
    scope: Scope = "layer",
    structure: Structures = UNSTRUCTURED,
) -> PyTree:
    r"""Masks of the largest weights: how to start from pretrained ones.

    .. math:: \text{active} = \text{the } N_l - \lfloor s_l N_l \rfloor
        \text{ weights of largest } |\theta| \text{ of layer } l

    With `scope="global"` the sum of these numbers, the largest of all layers together.
    A random mask on pretrained weights loses what they have learned.

    Args:
      params: Parameters, any pytree of arrays.
      sparsity: As in `rigl`.
      scope: `layer` or `global`.
      structure: As in `rigl`: scores are pooled to those of groups.

    Returns:
      A bool tree like params, for `initial_masks` of any method; all True for dense leaves.

    Raises:
      ValueError: As distributions do; if weights are not finite; on an unknown scope; if a layer
        would be cut with all of its scores equal, so that nothing but their order decides; if
        `global` leaves nothing of a layer.

    Example:
      >>> import jax.numpy as jnp, rigl_optax
      >>> masks = magnitude_masks({"kernel": jnp.arange(12.0).reshape(3, 4)}, 0.75)
      >>> masks["kernel"].sum(1).tolist()
      [0, 0, 3]
    """
    layout = _layout_of(params, sparsity, scope, structure)
    return _ranked(layout, layout.select(layout.leaves), scope)


def snip_masks(
    params: PyTree,
    sparsity: Sparsity,
    loss: Loss,
    batches: Sequence[Any],
    *,
    scope: Scope = "layer",
    structure: Structures = UNSTRUCTURED,
) -> PyTree:
    r"""SNIP: keeps the connections whose removal would change the loss most.

    .. math:: \text{score} = |\theta \odot \nabla_\theta L|

    with the gradient averaged over the batches. As in the RigL paper's code each
    layer keeps its share by the distribution; SNIP's own ranking is `scope="global"`. Float16
    parameters are scored as float32, and scores that leave the range of float32 computed again
    in float64, where the loss can be. Leaves that are not floating, as of embedding inputs or
    random keys, are left alone.

    Args:
      params: Parameters at initialisation.
      sparsity: As in `rigl`.
      loss: From params and a batch to a scalar, the mean over the batch.
      batches: One batch or several, of equal size.
      scope: `layer` or `global`.
      structure: As in `magnitude_masks`.

    Returns:
      A bool tree like params, for `static_sparse(..., initial_masks=...)`.

    Raises:
      ValueError: As `magnitude_masks` does; if there is no batch, or scores are not finite.

    Example:
      >>> import jax.numpy as jnp, rigl_optax
      >>> params = {"kernel": jnp.ones((4, 2))}
      >>> loss = lambda p, x: jnp.mean((x @ p["kernel"]) ** 2)
      >>> masks = snip_masks(params, 0.5, loss, [jnp.diag(jnp.arange(4.0))])
      >>> masks["kernel"].sum(1).tolist()
      [0, 0, 2, 2]

    References:
      Lee et al., `SNIP: single-shot network pruning based on connection sensitivity
      <https://arxiv.org/abs/1810.02340>`_, 2019; Evci et al. 2020, section 4 (and its
      erratum: ranking by the gradient alone is worse than random).
    """
    layout = _layout_of(params, sparsity, scope, structure)

    def score(dtype: Any, leaves: Leaves) -> Leaves:
        value, differentiable = _of_floating(layout, leaves, loss)
        gradient = _mean_over(batches, lambda batch: jax.grad(value)(differentiable, batch))
        return _products(layout, leaves, gradient, dtype)

    return _ranked(layout, _scores(layout, scope, score), scope)


def grasp_masks(
    params: PyTree,
    sparsity: Sparsity,
    loss: Loss,
    batches: Sequence[Any],
    *,
    scope: Scope = "layer",
    structure: Structures = UNSTRUCTURED,
) -> PyTree:
    r"""GraSP: keeps the connections whose removal would lower the norm of the gradient.

    .. math:: \text{score} = \theta \odot H g, \qquad g = \nabla_\theta L

    with the Hessian H of the loss; the largest scores are kept (the paper removes the largest
    of :math:`-\theta \odot H g`). g and Hg are averaged over the batches. The paper ranks all
    layers together, `scope="global"`.

    Args:
      params: Parameters at initialisation.
      sparsity: As in `rigl`.
      loss: As in `snip_masks`; twice differentiable where it matters. The authors' code divides
        logits by a temperature of 200 in it, which matters much: without, LeNet-300-100 on
        Fashion-MNIST with 95 % zeros stayed at 82 % (validation, one seed), with it came to 87 %.
      batches: As in `snip_masks`.
      scope: `layer` or `global`.
      structure: As in `rigl`; a group's score is the mean of its weights', with their signs.

    Returns:
      As `snip_masks`.

    Raises:
      ValueError: As `snip_masks` does.

    Example:
      >>> import jax.numpy as jnp, rigl_optax
      >>> params = {"kernel": jnp.ones((4, 2))}
      >>> loss = lambda p, x: jnp.mean((x @ p["kernel"]) ** 2)
      >>> masks = grasp_masks(params, 0.5, loss, [jnp.diag(jnp.arange(4.0))])
      >>> masks["kernel"].sum(1).tolist()
      [0, 0, 2, 2]

    References:
      Wang, Zhang and Grosse, `Picking winning tickets before training by preserving gradient
      flow <https://arxiv.org/abs/2002.07376>`_, 2020.
    """
    layout = _layout_of(params, sparsity, scope, structure)

    def score(dtype: Any, leaves: Leaves) -> Leaves:
        value, differentiable = _of_floating(layout, leaves, loss)
        # Of all leaves, sparse and dense: the gradient's norm is that of the whole network.
        gradient = _mean_over(batches, lambda batch: jax.grad(value)(differentiable, batch))

        def product(batch: Any) -> PyTree:
            of_batch = lambda p: jax.grad(value)(p, batch)  # noqa: E731
            return jax.jvp(of_batch, (differentiable,), (gradient,))[1]

        return _products(layout, leaves, _mean_over(batches, product), dtype)

    return _ranked(layout, _scores(layout, scope, score), scope, signed=True)


def synflow_masks(
    params: PyTree,
    sparsity: Sparsity,
    apply: Callable[[PyTree, jax.Array], jax.Array],
    input_shape: Sequence[int],
    *,
    iterations: int = 100,
    scope: Scope = "global",
    structure: Structures = UNSTRUCTURED,
) -> PyTree:
    r"""SynFlow: iterative pruning by synaptic saliency, without data.

    .. math::
        \text{score} = |\theta \odot \nabla_\theta R|, \qquad
        R = \sum \mathrm{apply}(|\theta|, \mathbb{1})

    At iteration k of n the density is :math:`\rho^{k/n}`, and what has been removed stays
    removed: no layer is ever emptied. With positive weights and inputs ReLU networks are
    linear; a model with normalisation needs an `apply` in which it is left out, or the saliency
    is not conserved between layers. R is a product over the layers: where it leaves the range of
    float32, as in deep networks, it is computed in float64.

    Args:
      params: Parameters at initialisation.
      sparsity: As in `rigl`; with `scope="global"` it decides on the total alone.
      apply: From params and an input of ones, float32, to outputs. The ones are int32 where it
        takes no floats, as with embeddings: those are looked up, and not asked for a gradient by
        their input.
      input_shape: Of one input, batch axis included if `apply` wants one.
      iterations: n; 100 in the paper.
      scope: `global` as in the paper, or `layer`.
      structure: As in `magnitude_masks`.

    Returns:
      As `snip_masks`.

    Raises:
      ValueError: As `magnitude_masks` does; if `iterations` is below 1, or scores are not
        finite.

    Example:
      >>> import jax.numpy as jnp, rigl_optax
      >>> params = {"kernel": jnp.arange(1.0, 9.0).reshape(4, 2)}
      >>> masks = synflow_masks(params, 0.5, lambda p, x: x @ p["kernel"], (1, 4), iterations=3)
      >>> masks["kernel"].sum(1).tolist()
      [0, 0, 2, 2]

    References:
      Tanaka et al., `Pruning neural networks without any data by iteratively conserving
      synaptic flow <https://arxiv.org/abs/2006.05467>`_, 2020.
    """
    iterations = _numbers.integer("iterations", iterations, least=1)
    layout = _layout_of(params, sparsity, scope, structure)
    shape = tuple(input_shape)
    takes_floats = _takes_floats(apply, params, shape)

    @functools.partial(jax.jit, static_argnums=0)
    def score(dtype: Any, leaves: Leaves, masks: Leaves) -> Leaves:
        def total(params: PyTree, ones: jax.Array) -> jax.Array:
            return jnp.sum(apply(params, ones).astype(dtype))

        positive = [abs(x) if _is_inexact(x) else x for x in leaves]
        for leaf, mask in zip(layout.sparse, masks, strict=True):
            positive[leaf.position] = jnp.where(mask, positive[leaf.position], 0)
        value, differentiable = _of_floating(layout, positive, total)
        ones = jnp.ones(shape, dtype if takes_floats else jnp.int32)
        return _products(layout, positive, jax.grad(value)(differentiable, ones), dtype)

    masks = layout.treedef.unflatten([jnp.ones(leaf.shape, bool) for leaf in layout.leaves])
    for k in range(1, iterations + 1):
        kept = _sparse(layout, masks)
        found = _scores(layout, scope, functools.partial(_call_with, score, kept))
        masks = _ranked(layout, found, scope, share=k / iterations, within=masks)
    return masks


def _layout_of(
    params: PyTree,
    sparsity: Sparsity,
    scope: str,
    structure: Structures,
) -> Layout:
    if scope not in get_args(Scope):
        raise ValueError(f"scope={scope!r}: must be one of {', '.join(get_args(Scope))}")
    _structures.check(structure)
    distribution = _layout.as_distribution(sparsity, None)
    layout = _layout.layout(params, distribution, masked=False, structure=structure)
    if not layout.sparse:
        raise ValueError("params has no leaves")
    if scope == "global":
        _layout.check_total(layout)
    return layout


def _mean_over(batches: Sequence[Any], function: Callable[[Any], PyTree]) -> PyTree:
    """The mean of a tree-valued function of a batch; compiled once."""
    if len(batches) == 0:
        raise ValueError("batches is empty: at least one batch is needed to score connections")
    compiled = jax.jit(function)
    total = compiled(batches[0])
    for batch in batches[1:]:
        total = jax.tree.map(jnp.add, total, compiled(batch))
    return jax.tree.map(lambda x: x / len(batches), total)


def _sparse(layout: Layout, tree: PyTree) -> Leaves:
    return layout.select(layout.treedef.flatten_up_to(tree))


def _products(layout: Layout, leaves: Leaves, factors: dict[int, jax.Array], dtype: Any) -> Leaves:
    """Weights times factors, of the sparse leaves."""
    pairs = [(leaves[leaf.position], factors[leaf.position]) for leaf in layout.sparse]
    return [jnp.asarray(w).astype(dtype) * f.astype(dtype) for w, f in pairs]


def _is_inexact(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.inexact)


def _of_floating(
    layout: Layout, leaves: Leaves, function: Callable[[PyTree, Any], jax.Array]
) -> tuple[Callable[[dict[int, jax.Array], Any], jax.Array], dict[int, jax.Array]]:
    """A function of params as one of those leaves that have a gradient, and these, by position."""
    differentiable = {i: x for i, x in enumerate(leaves) if _is_inexact(x)}

    def of_floating(chosen: dict[int, jax.Array], argument: Any) -> jax.Array:
        every = [chosen.get(i, x) for i, x in enumerate(leaves)]
        return function(layout.treedef.unflatten(every), argument)

    return of_floating, differentiable


def _takes_floats(apply: Callable, params: PyTree, shape: tuple[int, ...]) -> bool:
    """Whether `apply` takes an input of float32; else it has to take int32, as of tokens."""
    try:
        jax.eval_shape(apply, params, jax.ShapeDtypeStruct(shape, jnp.float32))
    except (TypeError, ValueError) as error:
        try:
            jax.eval_shape(apply, params, jax.ShapeDtypeStruct(shape, jnp.int32))
        except (TypeError, ValueError):
            raise error from None
        return False
    return True


def _scores(layout: Layout, scope: Scope, score: Callable[[Any, Leaves], Leaves]) -> Leaves:
    """Scores of the sparse leaves, float32, computed in more than float32 where that is needed.

    Args:
      layout: Of params.
      scope: Which are ranked together, and keep their ratios.
      score: From the dtype of scores and all leaves of params to scores.

    Returns:
      Scores; those of what fits no dtype as they come.
    """
    given = [jnp.asarray(x) if _is_inexact(x) else x for x in layout.leaves]
    with jax.numpy_dtype_promotion("standard"):
        wide = [
            x.astype(jnp.promote_types(x.dtype, jnp.float32)) if x.dtype == jnp.float16 else x
            for x in given
        ]
    try:
        found = score(jnp.float32, wide)
    except (TypeError, ValueError):
        if not any(x.dtype == jnp.float16 for x in given):
            raise
        found = score(jnp.float32, given)  # a model that insists on float16
    if _are_in_range(layout, found, scope):
        return found
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        widest = [
            x.astype(jnp.promote_types(x.dtype, jnp.float64)) if _is_inexact(x) else x
            for x in given
        ]
        try:
            precise = score(jnp.float64, widest)
        except (TypeError, ValueError):  # a model that insists on its own precision
            return found
        return _scaled(layout, precise, scope)


def _largest(layout: Layout, scores: Leaves) -> list[np.ndarray]:
    """The largest magnitude in each layer of each sparse leaf."""
    found = [
        jnp.max(jnp.abs(score), axis=tuple(range(int(leaf.stacked), score.ndim)))
        for leaf, score in zip(layout.sparse, scores, strict=True)
    ]
    return [np.asarray(x).reshape(-1) for x in found]


def _are_in_range(layout: Layout, scores: Leaves, scope: Scope) -> bool:
    """Whether float32, and its squares, hold the scores of every layer that is to be cut."""
    cut = [scope == "global" or leaf.zeros != 0 for leaf in layout.sparse]
    largest = [x for x, is_cut in zip(_largest(layout, scores), cut, strict=True) if is_cut]
    return all(((x >= 2.0**-60) & (x <= 2.0**60)).all() for x in largest)


def _scaled(layout: Layout, scores: Leaves, scope: Scope) -> Leaves:
    """Scores of float64 as float32, each ranking times a power of two that brings it to range."""
    largest = _largest(layout, scores)
    if scope == "global":
        whole = np.max(np.concatenate(largest))
        largest = [np.full_like(x, whole) for x in largest]
    scaled = []
    for leaf, score, top in zip(layout.sparse, scores, largest, strict=True):
        sound = np.where((top > 0) & np.isfinite(top), top, 1.0)
        factor = np.ldexp(1.0, 40 - np.frexp(sound)[1])
        shape = (*score.shape[: int(leaf.stacked)], *(1,) * (score.ndim - int(leaf.stacked)))
        scaled.append((score * factor.reshape(shape)).astype(jnp.float32))
    return scaled


def _call_with(
    score: Callable[[Any, Leaves, Leaves], Leaves], masks: Leaves, dtype: Any, leaves: Leaves
) -> Leaves:
    return score(dtype, leaves, masks)


def _ranked(
    layout: Layout,
    scores: Leaves,
    scope: Scope,
    *,
    signed: bool = False,
    share: float = 1.0,
    within: PyTree | None = None,
) -> PyTree:
    """Masks of the largest scores, in the tree structure of params.

    Args:
      layout: Says which leaves are sparse, and their zeros.
      scores: Of the sparse leaves; ranked by magnitude unless `signed`.
      scope: Which are ranked together.
      signed: Whether negative scores rank below positive ones.
      share: How much of the way to the final density, on a logarithmic scale.
      within: Masks outside of which nothing is kept.
    """
    for leaf, score in zip(layout.sparse, scores, strict=True):
        bad = int(jnp.sum(~jnp.isfinite(score)))
        if bad:
            raise ValueError(f"{leaf.path!r}: {bad} of {score.size} scores are not finite")
    packing = _layout.packing(layout.sparse)
    zeros = np.repeat([leaf.zeros for leaf in layout.sparse], packing.layers)
    sizes = packing.sizes().astype(np.int64)
    wanted, of = sizes - zeros, sizes
    if scope == "global":
        wanted, of = wanted.sum(keepdims=True), of.sum(keepdims=True)
    if share < 1:
        wanted = np.rint(of * (wanted / of) ** share).astype(np.int64)
    allowed = [None] * len(scores) if within is None else _sparse(layout, within)
    k = jnp.asarray(wanted, jnp.int32)
    chosen, layers = _top(tuple(layout.sparse), packing, scope, signed, scores, allowed, k)
    _check_choice(layout, scope, layers)
    masks = [jnp.ones(leaf.shape, bool) for leaf in layout.leaves]
    for leaf, mask in zip(layout.sparse, chosen, strict=True):
        masks[leaf.position] = mask
    return layout.treedef.unflatten(masks)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _top(
    sparse: tuple[SparseLeaf, ...],
    packing: Packing,
    scope: Scope,
    signed: bool,
    scores: Leaves,
    allowed: list[jax.Array | None],
    k: jax.Array,
) -> tuple[Leaves, list[_Choice]]:
    def as_integers(score: jax.Array, mask: jax.Array | None) -> jax.Array:
        integers = _signed_scores(score) if signed else _top_k.magnitude_scores(score)
        return integers if mask is None else jnp.where(mask, integers, _top_k.EXCLUDED)

    def of_groups(leaf: SparseLeaf, score: jax.Array) -> jax.Array:
        if not signed:
            return leaf.pool(score)
        return leaf.mean(score)  # what removals do adds up, with its sign

    pooled = [of_groups(leaf, s) for leaf, s in zip(sparse, scores, strict=True)]
    groups = [m if m is None else leaf.groups(m) for leaf, m in zip(sparse, allowed, strict=True)]
    integers = [as_integers(s, m) for s, m in zip(pooled, groups, strict=True)]
    packed = packing.pack(integers, _top_k.EXCLUDED)
    rows = packing.one_ranking() if scope == "global" else packing.rows
    chosen = packing.unpack(_top_k.top_k(packed, rows, packing.per_row(k)))
    each = zip(sparse, chosen, scores, strict=True)
    masks = [_sharding.like(leaf.expand(m), score) for leaf, m, score in each]
    return masks, [
        _Choice(*(x.reshape(-1) for x in _choice(leaf, s, m)))
        for leaf, s, m in zip(sparse, integers, chosen, strict=True)
    ]


def _choice(leaf: SparseLeaf, scores: jax.Array, chosen: jax.Array) -> tuple[jax.Array, ...]:
    axes = tuple(range(int(leaf.stacked), scores.ndim))
    is_open = scores != _top_k.EXCLUDED
    return (
        jnp.sum(chosen, axes, dtype=jnp.int32),
        jnp.sum(is_open, axes, dtype=jnp.int32),
        jnp.min(jnp.where(is_open, scores, np.iinfo(np.int32).max), axes),
        jnp.max(scores, axes),
    )


def _check_choice(layout: Layout, scope: Scope, choices: Sequence[_Choice]) -> None:
    """Raises a ValueError where nothing is left of a layer, or scores did not tell what to keep."""
    gone, blind = [], []
    for leaf, choice in zip(layout.sparse, choices, strict=True):
        kept, of, low, high = map(np.asarray, choice)
        if (kept == 0).any():
            gone.append(leaf.path)
        elif ((low == high) & (kept < of)).any():
            blind.append(leaf.path)
    if blind:
        raise ValueError(
            f"the scores of {_paths.listing(blind)} are all equal: which weights stay would be "
            "decided by their order alone. A layer that starts at zero, or that the loss does not "
            "reach through one, has no scores; nor has what underflows. Start it elsewhere, or "
            "keep it dense: `dense` of the distribution"
        )
    if gone:
        raise ValueError(
            f"scope={scope!r}: nothing is left of {_paths.listing(gone)}, whose scores are below "
            "those of all that stays; use scope='layer', a lower sparsity, or keep these layers "
            "dense: `dense` of the distribution"
        )


def _signed_scores(x: jax.Array) -> jax.Array:
    """Floats as non-negative int32 in the same order; the lowest bit is lost."""
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32) + 0.0, jnp.int32)
    ordered = jnp.where(bits < 0, ~bits, bits | jnp.int32(-(2**31))).astype(jnp.uint32)
    return (ordered >> 1).astype(jnp.int32)
