"""Implements SNFS, which drops by magnitude and grows by an average of dense gradients."""

import jax
import jax.numpy as jnp
import optax

from rigl_optax import _numbers
from rigl_optax._ranking import _apportion
from rigl_optax._structures import UNSTRUCTURED, Structures
from rigl_optax._types import Overrides, PyTree, Seed, Sparsity
from rigl_optax._wrapper import _transform
from rigl_optax._wrapper._method import RewiringInputs
from rigl_optax._wrapper._newborn import AT_REST, Grown
from rigl_optax.methods import _drop_and_grow


def sparse_momentum(
    inner: optax.GradientTransformation,
    sparsity: Sparsity | None,
    *,
    end: int,
    every: int = 100,
    begin: int = 0,
    drop_fraction: float | optax.Schedule = 0.3,
    momentum: float = 0.9,
    redistribute: bool = False,
    overrides: Overrides | None = None,
    gradient_step: bool = False,
    min_fan_in: int = 0,
    grown: Grown = AT_REST,
    structure: Structures = UNSTRUCTURED,
    initial_masks: PyTree | None = None,
    seed: Seed = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Sparse networks from scratch (SNFS): as `rigl`, but grows by a momentum of gradients.

    Use it if a dense gradient at every step is affordable, and single gradients are too noisy to
    grow by; `rigl(accumulate=n)` averages a few of them at less cost.

    $$
    \begin{aligned}
    M_t &= \mu M_{t-1} + (1 - \mu) \nabla_\theta L_t, \qquad M_{-1} = 0 \\
    K &= \text{the } n - k \text{ active weights of largest } |\theta|,
        \quad k = \mathrm{int32}(n \cdot f(t)) \\
    G &= \text{the } g \text{ positions outside } K \text{ of largest } |M_t|
    \end{aligned}
    $$

    Without redistribution each layer grows as many as it drops, `g = k`, as in the RigL
    paper's code. With redistribution, the dropped weights of all layers are split between the
    layers in proportion to the mean of $|M_t|$ over their active weights, as far as there is
    room:

    $$
    g_l \approx \frac{m_l}{\sum_j m_j} \sum_j k_j, \qquad
    m_l = \frac{1}{n_l} \sum_{i \text{ active in } l} |M_{t,i}|
    $$

    rounded so that the total number of active weights never changes. A layer keeps at least one
    weight, and with `min_fan_in` as many as its units need; layers that are not due by `overrides`
    neither give nor get weights. The means are sums of integers (16 bits, relative to a layer's
    largest), so they are the same on any number of devices. The average $M_t$ leaves out
    gradients that are not finite.

    Args:
      inner: As in `rigl`.
      sparsity: As in `rigl`.
      end: As in `rigl`.
      every: As in `rigl`.
      begin: As in `rigl`.
      drop_fraction: As in `rigl`.
      momentum: Decay of the average per step, in [0, 1). The RigL paper uses 0.9; there 0.99 was
        best, and 0 (RigL) as good as 0.9 at batch 4,096 (appendix D).
      redistribute: Whether weights move between layers, as in the SNFS paper.
      overrides: As in `rigl`.
      gradient_step: As in `rigl`.
      min_fan_in: As in `rigl`.
      grown: As in `rigl`; values made of gradients use the average.
      structure: As in `rigl`.
      initial_masks: As in `rigl`.
      seed: As in `rigl`.

    Returns:
      A transformation whose state is a `SparseState`; `memory.gradients` holds the average,
      float32.

    Raises:
      ValueError: As `rigl` does; if `momentum` is outside [0, 1).

    Examples:
      >>> import jax.numpy as jnp, optax, rigl_optax
      >>> tx = rigl_optax.sparse_momentum(optax.sgd(0.1), 0.9, end=1_000, redistribute=True)
      >>> int(rigl_optax.get_masks(tx.init({"kernel": jnp.ones((10, 10))}))["kernel"].sum())
      10

    References:
      Dettmers and Zettlemoyer, [Sparse networks from scratch: faster training without losing
      performance](https://arxiv.org/abs/1907.04840), 2019; as a baseline, Evci et al. 2020, section
      4.
    """
    momentum = _numbers.real("momentum", momentum)
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum={momentum}: must be in [0, 1)")

    def remember(count: jax.Array, average: jax.Array, gradient: jax.Array) -> jax.Array:
        del count
        # One NaN would stay in the average for ever.
        gradient = jnp.where(jnp.isfinite(gradient), gradient, 0)
        return momentum * average + (1 - momentum) * gradient

    def redistributed(total: jax.Array, room: jax.Array, inputs: RewiringInputs) -> jax.Array:
        # Not a float mean: layers would get other numbers on another mesh.
        means = _apportion.mean_magnitudes(
            inputs.gradients, inputs.masks, inputs.packing.ranking_ids
        )
        return _apportion.apportion(total, means, room)

    method = _drop_and_grow.drop_and_grow_method(
        _drop_and_grow.grow_by_gradient,
        end=end,
        every=every,
        begin=begin,
        drop_fraction=drop_fraction,
        overrides=overrides,
        gradient_step=gradient_step,
        min_fan_in=min_fan_in,
        grown=grown,
        seed=seed,
        grow_counts=redistributed if redistribute else None,
        remember=remember,
    )
    return _transform.sparse_transform(
        inner, sparsity, method, initial_masks=initial_masks, seed=seed, structure=structure
    )
