"""Chooses masks once, before training: by SNIP, GraSP, SynFlow, or by magnitude."""

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
    """How many groups of each layer of a leaf stay, and which scores they had; int32 [layers].

    Attributes:
      kept: Number of groups that stay.
      of: Number of groups with a score.
      lowest: The lowest score.
      highest: The highest score.
    """

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
    r"""Returns masks of the largest weights.

    Use it to start from pretrained weights: a random mask loses what they have learned. For fresh
    weights use random masks (the default of methods), or scores of a loss (`snip_masks`).

    $$
    \text{active} = \text{the } N_l - \lfloor s_l N_l \rfloor
        \text{ weights of largest } |\theta| \text{ of layer } l
    $$

    With `scope="global"` as many weights in all, the largest of all layers together.

    Args:
      params: Parameters, any pytree of arrays.
      sparsity: As in `rigl`.
      scope: `layer` keeps the share of each layer by the distribution; `global` ranks all layers
        together, and the distribution decides on the total only.
      structure: As in `rigl`; scores of weights are pooled to scores of groups.

    Returns:
      A bool tree like params, for `initial_masks` of any method; all True for dense leaves.

    Raises:
      ValueError: As distributions do; if weights are not finite; if the scope is unknown; if all
        scores of a layer that is to lose weights are equal; if `global` leaves nothing of a layer.

    Examples:
      >>> import jax.numpy as jnp, rigl_optax
      >>> masks = magnitude_masks({"kernel": jnp.arange(12.0).reshape(3, 4)}, 0.75)
      >>> masks["kernel"].sum(1).tolist()
      [0, 0, 3]
    """
    return largest(_layout_of(params, sparsity, scope, structure), scope)


def largest(layout: Layout, scope: Scope = "layer") -> PyTree:
    """Returns masks of the largest weights of a layout, as many as it says."""
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

    Use it for static masks if one batch of data is at hand before training. On Fashion-MNIST it was
    below a random mask of the same distribution (docs/results.md).

    $$
    \text{score} = |\theta \odot \nabla_\theta L|
    $$

    with the gradient averaged over the batches. The RigL paper's code keeps the share of each layer
    by the distribution, as the default here; SNIP's own ranking is `scope="global"`. Parameters in
    float16 are scored in float32. If scores leave the range of float32, they are computed again in
    float64, if the loss allows it. Leaves that are not floating, such as random keys, get no
    gradient.

    Args:
      params: Parameters at initialisation.
      sparsity: As in `rigl`.
      loss: `loss(params, batch) -> scalar`, the mean over the batch.
      batches: One batch or several, of equal size.
      scope: As in `magnitude_masks`.
      structure: As in `magnitude_masks`.

    Returns:
      A bool tree like params, for `static_sparse(..., initial_masks=...)`.

    Raises:
      ValueError: As `magnitude_masks` does; if there is no batch, or scores are not finite.

    Examples:
      >>> import jax.numpy as jnp, rigl_optax
      >>> params = {"kernel": jnp.ones((4, 2))}
      >>> loss = lambda p, x: jnp.mean((x @ p["kernel"]) ** 2)
      >>> masks = snip_masks(params, 0.5, loss, [jnp.diag(jnp.arange(4.0))])
      >>> masks["kernel"].sum(1).tolist()
      [0, 0, 2, 2]

    References:
      Lee et al., [SNIP: single-shot network pruning based on connection
      sensitivity](https://arxiv.org/abs/1810.02340), 2019; Evci et al. 2020, section 4 (and its
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

    Use it as a baseline for static masks. Its authors mean it for very high sparsity, where SNIP
    with `scope="global"` may cut layers off. On Fashion-MNIST it was below a random mask of the
    same distribution (docs/results.md).

    $$
    \text{score} = \theta \odot H g, \qquad g = \nabla_\theta L
    $$

    with the Hessian H of the loss; the largest scores are kept (the paper removes the largest
    of $-\theta \odot H g$). g and Hg are averaged over the batches. The paper ranks all
    layers together, `scope="global"`.

    Args:
      params: Parameters at initialisation.
      sparsity: As in `rigl`.
      loss: As in `snip_masks`, twice differentiable. The authors' code divides logits by a
        temperature of 200 in it; do the same: LeNet-300-100 on Fashion-MNIST with 95 % zeros
        reached 87 % with the temperature and 82 % without (validation, one seed).
      batches: As in `snip_masks`.
      scope: As in `magnitude_masks`.
      structure: As in `rigl`; the score of a group is the mean of its weights' signed scores.

    Returns:
      As `snip_masks`.

    Raises:
      ValueError: As `snip_masks` does.

    Examples:
      >>> import jax.numpy as jnp, rigl_optax
      >>> params = {"kernel": jnp.ones((4, 2))}
      >>> loss = lambda p, x: jnp.mean((x @ p["kernel"]) ** 2)
      >>> masks = grasp_masks(params, 0.5, loss, [jnp.diag(jnp.arange(4.0))])
      >>> masks["kernel"].sum(1).tolist()
      [0, 0, 2, 2]

    References:
      Wang, Zhang and Grosse, [Picking winning tickets before training by preserving gradient
      flow](https://arxiv.org/abs/2002.07376), 2020.
    """
    layout = _layout_of(params, sparsity, scope, structure)

    def score(dtype: Any, leaves: Leaves) -> Leaves:
        value, differentiable = _of_floating(layout, leaves, loss)
        # With respect to dense leaves too: the norm is that of the whole network's gradient.
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
    r"""SynFlow: prunes iteratively by synaptic saliency, without data.

    Use it for static masks if there is no data before training, or if no layer may be emptied; of
    the masks chosen before training it was the best here (docs/results.md).

    $$
    \text{score} = |\theta \odot \nabla_\theta R|, \qquad
    R = \sum \mathrm{apply}(|\theta|, \mathbb{1})
    $$

    At iteration k of n the density is $\rho^{k/n}$, and a removed weight stays removed, so
    no layer is ever emptied. With positive weights and inputs a ReLU network is linear. Give an
    `apply` without normalisation, or saliency is not conserved between layers. R is a product over
    the layers; if it leaves the range of float32, as in deep networks, it is computed in float64.

    Args:
      params: Parameters at initialisation.
      sparsity: As in `rigl`; with `scope="global"` it decides on the total only.
      apply: `apply(params, ones) -> outputs`, where `ones` is float32; it is int32 if `apply` takes
        no floats, such as a model of tokens.
      input_shape: Shape of the input, with a batch axis if `apply` needs one.
      iterations: n; 100 in the paper.
      scope: As in `magnitude_masks`; `global` in the paper.
      structure: As in `magnitude_masks`.

    Returns:
      As `snip_masks`.

    Raises:
      ValueError: As `magnitude_masks` does; if `iterations` is below 1, or scores are not
        finite.

    Examples:
      >>> import jax.numpy as jnp, rigl_optax
      >>> params = {"kernel": jnp.arange(1.0, 9.0).reshape(4, 2)}
      >>> masks = synflow_masks(params, 0.5, lambda p, x: x @ p["kernel"], (1, 4), iterations=3)
      >>> masks["kernel"].sum(1).tolist()
      [0, 0, 2, 2]

    References:
      Tanaka et al., [Pruning neural networks without any data by iteratively conserving synaptic
      flow](https://arxiv.org/abs/2006.05467), 2020.
    """
    iterations = _numbers.integer("iterations", iterations, least=1)
    layout = _layout_of(params, sparsity, scope, structure)
    shape = tuple(input_shape)
    takes_floats = _takes_floats(apply, params, shape)

    # Masks are an argument, so that all iterations share one compiled program.
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
        scores = _scores(layout, scope, functools.partial(_call_with, score, kept))
        masks = _ranked(layout, scores, scope, share=k / iterations, within=masks)
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
    """Returns the mean of `function(batch) -> tree` over the batches; compiles it once."""
    if len(batches) == 0:
        raise ValueError("batches is empty: give at least one batch to score connections with")
    compiled = jax.jit(function)
    total = compiled(batches[0])
    for batch in batches[1:]:
        total = jax.tree.map(jnp.add, total, compiled(batch))
    return jax.tree.map(lambda x: x / len(batches), total)


def _sparse(layout: Layout, tree: PyTree) -> Leaves:
    return layout.select(layout.treedef.flatten_up_to(tree))


def _products(layout: Layout, leaves: Leaves, factors: dict[int, jax.Array], dtype: Any) -> Leaves:
    """Returns weights times factors, for the sparse leaves."""
    pairs = [(leaves[leaf.position], factors[leaf.position]) for leaf in layout.sparse]
    return [jnp.asarray(w).astype(dtype) * f.astype(dtype) for w, f in pairs]


def _is_inexact(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.inexact)


def _of_floating(
    layout: Layout, leaves: Leaves, function: Callable[[PyTree, Any], jax.Array]
) -> tuple[Callable[[dict[int, jax.Array], Any], jax.Array], dict[int, jax.Array]]:
    """Rewrites `function(params, argument)` as a function of the leaves that have a gradient.

    Returns:
      The new function, `of_floating({position: leaf}, argument)`, and its `{position: leaf}`.
    """
    differentiable = {i: x for i, x in enumerate(leaves) if _is_inexact(x)}

    def of_floating(chosen: dict[int, jax.Array], argument: Any) -> jax.Array:
        every = [chosen.get(i, x) for i, x in enumerate(leaves)]
        return function(layout.treedef.unflatten(every), argument)

    return of_floating, differentiable


def _takes_floats(apply: Callable, params: PyTree, shape: tuple[int, ...]) -> bool:
    """Returns whether `apply` takes a float32 input; raises if it takes int32 neither."""
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
    """Computes the scores of the sparse leaves, in float64 if they leave the range of float32.

    Args:
      layout: Layout of params.
      scope: `layer` or `global`: which scores are ranked together, and must keep their ratios.
      score: `score(dtype, leaves) -> scores`, from all leaves of params.

    Returns:
      float32 scores of the sparse leaves. If even float64 cannot be used, they may be out of range.
    """
    given = [jnp.asarray(x) if _is_inexact(x) else x for x in layout.leaves]
    with jax.numpy_dtype_promotion("standard"):
        wide = [
            x.astype(jnp.promote_types(x.dtype, jnp.float32)) if x.dtype == jnp.float16 else x
            for x in given
        ]
    try:
        scores = score(jnp.float32, wide)
    except (TypeError, ValueError):
        if not any(x.dtype == jnp.float16 for x in given):
            raise
        scores = score(jnp.float32, given)  # the model accepts float16 only
    if _are_in_range(layout, scores, scope):
        return scores
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        widest = [
            x.astype(jnp.promote_types(x.dtype, jnp.float64)) if _is_inexact(x) else x
            for x in given
        ]
        try:
            precise = score(jnp.float64, widest)
        except (TypeError, ValueError):  # the model accepts its own precision only
            return scores
        return _scaled(layout, precise, scope)


def _largest(layout: Layout, scores: Leaves) -> list[np.ndarray]:
    """Returns the largest magnitude in each layer of each sparse leaf."""
    magnitudes = [
        jnp.max(jnp.abs(score), axis=tuple(range(int(leaf.stacked), score.ndim)))
        for leaf, score in zip(layout.sparse, scores, strict=True)
    ]
    return [np.asarray(x).reshape(-1) for x in magnitudes]


def _are_in_range(layout: Layout, scores: Leaves, scope: Scope) -> bool:
    """Returns whether float32 holds the scores, and their squares, of every layer to be cut."""
    # Squares, since `Block(pool_by="l2")` pools them; 2**-126 and 2**128 are float32's limits.
    cut = [scope == "global" or leaf.zeros != 0 for leaf in layout.sparse]
    largest = [x for x, is_cut in zip(_largest(layout, scores), cut, strict=True) if is_cut]
    return all(((x >= 2.0**-60) & (x <= 2.0**60)).all() for x in largest)


def _scaled(layout: Layout, scores: Leaves, scope: Scope) -> Leaves:
    """Converts float64 scores to float32, each ranking scaled into the range of float32."""
    largest = _largest(layout, scores)
    if scope == "global":
        whole = np.max(np.concatenate(largest))
        largest = [np.full_like(x, whole) for x in largest]
    scaled = []
    for leaf, score, top in zip(layout.sparse, scores, largest, strict=True):
        sound = np.where((top > 0) & np.isfinite(top), top, 1.0)
        # A power of two, so that scaling itself rounds nothing.
        factor = np.ldexp(1.0, 40 - np.frexp(sound)[1])
        shape = (*score.shape[: int(leaf.stacked)], *(1,) * (score.ndim - int(leaf.stacked)))
        scaled.append((score * factor.reshape(shape)).astype(jnp.float32))
    return scaled


def _call_with(
    score: Callable[[Any, Leaves, Leaves], Leaves], masks: Leaves, dtype: Any, leaves: Leaves
) -> Leaves:
    """Calls `score`, with its arguments in an order in which `partial` can fix the masks."""
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
    """Returns masks of the largest scores, in the tree structure of params.

    Args:
      layout: Says which leaves are sparse, and their zeros.
      scores: Scores of the sparse leaves; ranked by magnitude unless `signed`.
      scope: `layer` or `global`: which scores are ranked together.
      signed: Whether negative scores rank below positive ones.
      share: Share of the way to the final density, on a logarithmic scale.
      within: Masks outside of which no weight is kept; None for no such limit.

    Raises:
      ValueError: If scores are not finite, are all equal in a layer, or leave nothing of a layer.
    """
    for leaf, score in zip(layout.sparse, scores, strict=True):
        bad = int(jnp.sum(~jnp.isfinite(score)))
        if bad:
            raise ValueError(f"{leaf.path!r}: {bad} of {score.size} scores are not finite")
    packing = _layout.packing(layout.sparse)
    zeros = np.repeat([leaf.zeros for leaf in layout.sparse], packing.rankings_per_leaf)
    sizes = packing.sizes().astype(np.int64)
    wanted, of = sizes - zeros, sizes
    if scope == "global":
        wanted, of = wanted.sum(keepdims=True), of.sum(keepdims=True)
    if share < 1:
        # On the host in float64: these numbers are static, and must be the same everywhere.
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
        return leaf.mean(score)  # the effects of removing several weights add up, with their signs

    pooled = [of_groups(leaf, s) for leaf, s in zip(sparse, scores, strict=True)]
    groups = [m if m is None else leaf.groups(m) for leaf, m in zip(sparse, allowed, strict=True)]
    integers = [as_integers(s, m) for s, m in zip(pooled, groups, strict=True)]
    packed = packing.pack(integers, _top_k.EXCLUDED)
    ranking_ids = packing.one_ranking() if scope == "global" else packing.ranking_ids
    chosen = packing.unpack(_top_k.top_k(packed, ranking_ids, packing.per_row(k)))
    triples = zip(sparse, chosen, scores, strict=True)
    masks = [_sharding.like(leaf.expand(m), score) for leaf, m, score in triples]
    return masks, [
        _Choice(*(x.reshape(-1) for x in _choice(leaf, s, m)))
        for leaf, s, m in zip(sparse, integers, chosen, strict=True)
    ]


def _choice(leaf: SparseLeaf, scores: jax.Array, chosen: jax.Array) -> tuple[jax.Array, ...]:
    """Returns the fields of `_Choice`, one for each layer, in the shape of the stack."""
    axes = tuple(range(int(leaf.stacked), scores.ndim))
    is_open = scores != _top_k.EXCLUDED
    return (
        jnp.sum(chosen, axes, dtype=jnp.int32),
        jnp.sum(is_open, axes, dtype=jnp.int32),
        jnp.min(jnp.where(is_open, scores, np.iinfo(np.int32).max), axes),
        jnp.max(scores, axes),
    )


def _check_choice(layout: Layout, scope: Scope, choices: Sequence[_Choice]) -> None:
    """Checks the choice in each layer.

    Raises:
      ValueError: If nothing is left of a layer, or a layer was cut with all of its scores equal.
    """
    emptied, tied = [], []
    for leaf, choice in zip(layout.sparse, choices, strict=True):
        kept, of, low, high = map(np.asarray, choice)
        if (kept == 0).any():
            emptied.append(leaf.path)
        elif ((low == high) & (kept < of)).any():
            tied.append(leaf.path)
    if tied:
        raise ValueError(
            f"the scores of {_paths.listing(tied)} are all equal, so only the order of weights "
            "would decide which of them stay. Scores are 0 if a layer starts at zero, if the loss "
            "reaches it only through such a layer, or if they underflow. Start the layer at other "
            "values, or keep it dense: `dense` of the distribution"
        )
    if emptied:
        raise ValueError(
            f"scope={scope!r}: nothing is left of {_paths.listing(emptied)}, whose scores are "
            "below all that stay; use scope='layer' or a lower sparsity, or keep these layers "
            "dense: `dense` of the distribution"
        )


def _signed_scores(x: jax.Array) -> jax.Array:
    """Returns non-negative int32 scores in the order of signed floats; the lowest bit is lost."""
    # Adding 0.0 makes -0.0 to 0.0, so that both have one score.
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32) + 0.0, jnp.int32)
    ordered = jnp.where(bits < 0, ~bits, bits | jnp.int32(-(2**31))).astype(jnp.uint32)
    return (ordered >> 1).astype(jnp.int32)
