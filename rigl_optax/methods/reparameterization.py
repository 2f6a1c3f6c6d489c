"""Implements DSR: a global threshold drops weights, and all layers share the growth."""

import jax.numpy as jnp
import optax

from rigl_optax import _layout, _numbers, _plan
from rigl_optax._ranking import _apportion, _keep_and_grow, _top_k
from rigl_optax._ranking._packing import Packing
from rigl_optax._structures import UNSTRUCTURED, Structures
from rigl_optax._types import Arrays, PyTree, Seed, Sparsity
from rigl_optax._wrapper import _transform
from rigl_optax._wrapper._method import Decision, InitialMemory, Method, RewiringInputs
from rigl_optax._wrapper._newborn import AT_REST, Grown
from rigl_optax.methods import _drop_and_grow


def dynamic_sparse_reparameterization(
    inner: optax.GradientTransformation,
    sparsity: Sparsity | None,
    *,
    end: int,
    every: int = 100,
    begin: int = 0,
    drop_fraction: float | optax.Schedule = 0.3,
    initial_threshold: float = 1e-3,
    tolerance: float = 0.1,
    gradient_step: bool = False,
    grown: Grown = AT_REST,
    structure: Structures = UNSTRUCTURED,
    initial_masks: PyTree | None = None,
    seed: Seed = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Dynamic sparse reparameterization (DSR): one threshold for all layers, random growth.

    Use it if the number of weights of each layer may change in training and dense gradients cannot
    be had; `sparse_evolutionary_training` keeps the number of each layer.

    With $n_l$ active weights in layer l and a threshold H, at a rewiring

    $$
    \begin{aligned}
    K_l &= \{i \text{ active in } l : |\theta_i| \ge H\}
        \text{, at least the largest one} \\
    D &= \sum_l (n_l - |K_l|), \qquad T = \mathrm{int32}(f(t) \sum_l n_l) \\
    H &\leftarrow 2H \text{ if } D < (1 - \delta) T, \quad
         H / 2 \text{ if } D > (1 + \delta) T \\
    g_l &\approx D \, |K_l| / \sum_j |K_j| \text{ positions outside } K_l
        \text{ grow, uniformly at random}
    \end{aligned}
    $$

    The total number of active weights never changes; the number of each layer does, and the FLOPs
    with it. The threshold is adapted so that it drops about T weights. A layer keeps at least its
    largest weight, since an empty one would never grow again.

    Args:
      inner: As in `rigl`.
      sparsity: As in `rigl`; the sparsities of layers are those at the start.
      end: As in `rigl`.
      every: As in `rigl`.
      begin: As in `rigl`.
      drop_fraction: As in `rigl`, of all active weights together; the threshold aims at it.
      initial_threshold: H at the start, in units of the weights.
      tolerance: $\delta$, how far the drop may be from T, in [0, 1).
      gradient_step: As in `rigl`.
      grown: As in `rigl`.
      structure: As in `rigl`.
      initial_masks: As in `rigl`.
      seed: Seeds the initial masks and the growth, in separate streams.

    Returns:
      A transformation whose state is a `SparseState`; `memory.numbers` is H, a float32 scalar.

    Raises:
      ValueError: As `rigl` does; if `initial_threshold` is not above 0, or `tolerance` is outside
        [0, 1).

    Examples:
      >>> import jax.numpy as jnp, optax, rigl_optax
      >>> tx = rigl_optax.dynamic_sparse_reparameterization(optax.sgd(0.1), 0.9, end=1_000)
      >>> int(rigl_optax.get_masks(tx.init({"kernel": jnp.ones((10, 10))}))["kernel"].sum())
      10

    References:
      Mostafa and Wang, [Parameter efficient training of deep convolutional neural networks by
      dynamic sparse reparameterization](https://arxiv.org/abs/1902.05967), 2019.
    """
    initial_threshold = _numbers.real("initial_threshold", initial_threshold)
    tolerance = _numbers.real("tolerance", tolerance)
    if not initial_threshold > 0:
        raise ValueError(f"initial_threshold={initial_threshold}: must be above 0")
    if not 0 <= tolerance < 1:
        raise ValueError(f"tolerance={tolerance}: must be in [0, 1)")
    plan = _plan.rewiring_plan(begin=begin, end=end, every=every, drop_fraction=drop_fraction)
    grown.check()
    random_scores = _drop_and_grow.grow_at_random(seed)

    def start(layout: _layout.Layout, packing: Packing, masks: Arrays) -> InitialMemory:
        del layout, packing, masks
        return InitialMemory([], jnp.float32(initial_threshold))

    def rule(inputs: RewiringInputs) -> Decision:
        ranking_ids, threshold = inputs.packing.ranking_ids, inputs.numbers
        above = [
            mask & (jnp.abs(weight) >= threshold)
            for weight, mask in zip(inputs.weights, inputs.masks, strict=True)
        ]
        active = _top_k.counts(inputs.masks, ranking_ids)
        # At least the largest weight of a layer; an empty layer has none to keep.
        keep = jnp.minimum(jnp.maximum(_top_k.counts(above, ranking_ids), 1), active)
        total = jnp.sum(active, dtype=jnp.int32)
        dropped = total - jnp.sum(keep, dtype=jnp.int32)
        target = _keep_and_grow.drop_counts(total, plan.default.drop_fraction(inputs.count))
        room = jnp.asarray(inputs.packing.sizes()) - keep
        # In integers, so that layers get as many on every mesh: see `_ranking/_apportion.py`.
        grow = _apportion.apportion(dropped, keep.astype(jnp.float32), room)
        masks = _keep_and_grow.keep_and_grow(
            _keep_and_grow.drop_scores(inputs.weights, inputs.masks),
            random_scores(inputs),
            ranking_ids,
            keep,
            grow,
        )
        drops, aim = dropped.astype(jnp.float32), target.astype(jnp.float32)
        # Factors of two: scaling the threshold rounds nothing.
        factor = jnp.where(
            drops < jnp.float32(1 - tolerance) * aim,
            jnp.float32(2),
            jnp.where(drops > jnp.float32(1 + tolerance) * aim, jnp.float32(0.5), jnp.float32(1)),
        )
        return Decision(masks, numbers=threshold * factor)

    method = Method(
        plan,
        rule,
        replaces_step=not gradient_step,
        start=start,
        grown_values=grown.values(seed),
        keeps_initial=grown.value == "initial",
        grown_state=grown.state,
        check=lambda layout, start: _layout.check_total(layout),
        moves_between_layers=True,
    )
    return _transform.sparse_transform(
        inner, sparsity, method, initial_masks=initial_masks, seed=seed, structure=structure
    )
