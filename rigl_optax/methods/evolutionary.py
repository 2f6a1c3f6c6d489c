"""Implements SET, which drops by magnitude and grows at random."""

import optax

from rigl_optax._structures import UNSTRUCTURED, Structures
from rigl_optax._types import Overrides, PyTree, Seed, Sparsity
from rigl_optax._wrapper import _transform
from rigl_optax._wrapper._newborn import AT_REST, Grown
from rigl_optax.methods import _drop_and_grow


def sparse_evolutionary_training(
    inner: optax.GradientTransformation,
    sparsity: Sparsity | None,
    *,
    end: int,
    every: int = 100,
    begin: int = 0,
    drop_fraction: float | optax.Schedule = 0.3,
    overrides: Overrides | None = None,
    gradient_step: bool = False,
    min_fan_in: int = 0,
    grown: Grown = AT_REST,
    structure: Structures = UNSTRUCTURED,
    initial_masks: PyTree | None = None,
    seed: Seed = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Sparse evolutionary training (SET): as `rigl`, but growth is uniformly random.

    Use it if dense gradients cannot be had, or cost too much; `rigl` grows by them.

    $$
    \begin{aligned}
    k &= \mathrm{int32}(n \cdot f(t)) \\
    K &= \text{the } n - k \text{ active weights of largest } |\theta| \\
    G &= k \text{ positions outside } K \text{, uniformly at random}
    \end{aligned}
    $$

    As in all methods here a rewiring replaces the gradient step; for SET the RigL reference code
    does both in one step.

    Args:
      inner: Any Optax optimizer.
      sparsity: As in `rigl`.
      end: As in `rigl`.
      every: As in `rigl`.
      begin: As in `rigl`.
      drop_fraction: As in `rigl`; the SET paper calls it zeta and keeps it constant
        (`constant_drop_fraction(0.3)`); in the RigL paper it decays here too.
      overrides: As in `rigl`.
      gradient_step: As in `rigl`; True is closest to the reference code for SET.
      min_fan_in: As in `rigl`.
      grown: As in `rigl`.
      structure: As in `rigl`.
      initial_masks: As in `rigl`.
      seed: Seeds the initial masks and the growth, in separate streams.

    Returns:
      A transformation whose state is a `SparseState`.

    Raises:
      ValueError: As `rigl` does.

    Examples:
      >>> import jax.numpy as jnp, optax, rigl_optax
      >>> tx = rigl_optax.sparse_evolutionary_training(optax.adam(1e-3), 0.9, end=1_000)
      >>> int(rigl_optax.get_masks(tx.init({"kernel": jnp.ones((10, 10))}))["kernel"].sum())
      10

    References:
      Mocanu et al., [Scalable training of artificial neural networks with adaptive sparse
      connectivity inspired by network science](https://arxiv.org/abs/1707.04780), 2018; as a
      baseline, Evci et al. 2020, section 4.
    """
    method = _drop_and_grow.drop_and_grow_method(
        _drop_and_grow.grow_at_random(seed),
        end=end,
        every=every,
        begin=begin,
        drop_fraction=drop_fraction,
        overrides=overrides,
        gradient_step=gradient_step,
        min_fan_in=min_fan_in,
        grown=grown,
        seed=seed,
        needs_signal=False,
    )
    return _transform.sparse_transform(
        inner, sparsity, method, initial_masks=initial_masks, seed=seed, structure=structure
    )
