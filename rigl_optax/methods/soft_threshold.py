"""Implements STR, which learns a soft threshold for each layer."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rigl_optax import _distributions, _layout, _plan
from rigl_optax._ranking import _top_k
from rigl_optax._ranking._packing import Packing
from rigl_optax._types import Arrays, LayerSparsities, PyTree, Seed
from rigl_optax._wrapper import _transform
from rigl_optax._wrapper._method import Decision, InitialMemory, Method, RewiringInputs, Shadow
from rigl_optax._xla import _blend, _sharding


def soft_thresholding(
    inner: optax.GradientTransformation,
    layers: LayerSparsities | None = None,
    *,
    threshold_decay: float,
    initial_threshold: float = -6.0,
    thresholds: optax.GradientTransformation | None = None,
    seed: Seed = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Soft threshold reparameterization (STR): learns how sparse each layer is.

    Use it if the network itself should choose the sparsity of each layer, and the overall sparsity
    need not be known before training; all other methods reach a given one.

    With shadow weights w and a number $s_l$ for each layer,

    $$
    \begin{aligned}
    \theta &= \mathrm{sign}(w) \max(|w| - \sigma(s_l), 0) \\
    \frac{\partial L}{\partial w} &= [\theta \ne 0] \nabla_\theta L, \qquad
    \frac{\partial L}{\partial s_l} = -\sigma'(s_l) \sum_{i \in l}
        [\theta_i \ne 0] \, \mathrm{sign}(w_i) \nabla_{\theta_i} L + \lambda s_l
    \end{aligned}
    $$

    The decay $\lambda$ pulls $s_l$ up to 0, and the threshold with it to 1/2; the
    loss pushes back. The final sparsity depends on $\lambda$, the initial threshold, the
    weight decay and the number of steps. At first only weights below the initial threshold are
    inactive.

    Args:
      inner: As in `rigl`; it moves the shadow weights, and its weight decay shrinks weights below
        the threshold too.
      layers: A distribution whose `dense` and `stacked` say which leaves are sparse, and whose
        sparsities those of the random masks at the start; `uniform(0.0)` if not given.
      threshold_decay: $\lambda$ (the paper uses its weight decay).
      initial_threshold: $s_l$ at the start; the threshold is its sigmoid: -6 gives 0.0025.
      thresholds: The optimizer of $s_l$; `inner` if not given, with a state of its own.
      seed: As in `rigl`.

    Returns:
      A transformation whose state is a `SparseState` with `shadow`; `memory.numbers` holds
      $s_l$, float32 of shape () or (layers,) for each sparse leaf, and the state of its
      optimizer. Its gradients are sums of floats, so the thresholds, and then the masks, may differ
      on another number of devices.

    Raises:
      ValueError: As `rigl` does; if `threshold_decay` is below 0.

    Examples:
      >>> import jax.numpy as jnp, optax, rigl_optax
      >>> params = {"kernel": jnp.array([[0.1, -0.9], [0.7, -0.2]])}
      >>> tx = rigl_optax.soft_thresholding(
      ...     optax.sgd(0.0), threshold_decay=0.0, initial_threshold=0.0)
      >>> zero = {"kernel": jnp.zeros((2, 2))}
      >>> updates, state = tx.update(zero, tx.init(params), params)
      >>> [round(x, 1) for x in optax.apply_updates(params, updates)["kernel"].ravel().tolist()]
      [0.0, -0.4, 0.2, 0.0]

    References:
      Kusupati et al., [Soft threshold weight reparameterization for learnable
      sparsity](https://arxiv.org/abs/2002.03231), 2020.
    """
    if not threshold_decay >= 0:
        raise ValueError(f"threshold_decay={threshold_decay}: must be at least 0")
    mover = optax.with_extra_args_support(inner if thresholds is None else thresholds)

    def start(layout: _layout.Layout, packing: Packing, masks: Arrays) -> InitialMemory:
        del masks
        pairs = zip(packing.rankings_per_leaf, layout.sparse, strict=True)
        shapes = [(number,) if leaf.stacked else () for number, leaf in pairs]
        values = [jnp.full(shape, initial_threshold, jnp.float32) for shape in shapes]
        return InitialMemory([], (values, mover.init(values)))

    def backward(inputs: RewiringInputs) -> Arrays:
        return [_blend.masked(m, g) for m, g in zip(inputs.masks, inputs.gradients, strict=True)]

    def settle(inputs: RewiringInputs, moved: Arrays) -> tuple[Arrays, PyTree]:
        values, state = inputs.numbers
        slopes = []
        for i, value in enumerate(values):
            gradient, shadow = inputs.gradients[i].astype(jnp.float32), inputs.weights[i]
            along = _blend.masked(inputs.masks[i], gradient * jnp.sign(shadow.astype(jnp.float32)))
            # One sum for each layer; a float sum, so it is not the same on every mesh.
            total = _sharding.whole(jnp.sum(along, axis=tuple(range(value.ndim, along.ndim))))
            threshold = jax.nn.sigmoid(value)
            slope = -threshold * (1 - threshold) * total
            slopes.append(slope + jnp.float32(threshold_decay) * value)
        steps, state = mover.update(slopes, state, values)
        return moved, (optax.apply_updates(values, steps), state)

    def forward(shadow: Arrays, masks: Arrays, numbers: PyTree) -> Arrays:
        shown = []
        for weight, mask, value in zip(shadow, masks, numbers[0], strict=True):
            threshold = jax.nn.sigmoid(value).reshape(value.shape + (1,) * (mask.ndim - value.ndim))
            w = weight.astype(jnp.float32)
            # Where the mask is True, |w| is above the threshold: no maximum with 0 is needed.
            shrunk = jnp.sign(w) * (jnp.abs(w) - threshold)
            shown.append(_blend.masked(mask, shrunk.astype(weight.dtype)))
        return shown

    def rule(inputs: RewiringInputs) -> Decision:
        # One threshold for each ranking, in the order of `packing.ranking_ids`.
        vector = jnp.concatenate([value.reshape(-1) for value in inputs.numbers[0]])
        each = zip(inputs.weights, inputs.packing.ranking_ids, strict=True)
        return Decision(
            [
                jnp.abs(w) > _top_k.spread(jax.nn.sigmoid(vector), w, ranking_ids)
                for w, ranking_ids in each
            ]
        )

    # Masks follow the thresholds at every step, as long as training lasts.
    last = int(np.iinfo(np.int32).max)
    method = Method(
        _plan.rewiring_plan(begin=0, end=last, every=1),
        rule,
        start=start,
        shadow=Shadow(backward, settle, forward),
    )
    return _transform.sparse_transform(
        inner, layers or _distributions.uniform(0.0), method, initial_masks=None, seed=seed
    )
