"""Implements static sparse training, whose masks never change."""

import optax

from rigl_optax._structures import UNSTRUCTURED, Structures
from rigl_optax._types import PyTree, Seed, Sparsity
from rigl_optax._wrapper import _transform
from rigl_optax._wrapper._method import Decision, Method


def static_sparse(
    inner: optax.GradientTransformation,
    sparsity: Sparsity | None,
    *,
    structure: Structures = UNSTRUCTURED,
    initial_masks: PyTree | None = None,
    seed: Seed = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Trains with masks that never change: random ones, or given ones.

    Use it as the control for every dynamic method (the paper's "Static"), and to train with masks
    that were chosen before: `snip_masks` and its relatives, `lottery_ticket`.

    $$
    \theta_{t+1} = m \odot (\theta_t + \mathrm{inner}(m \odot \nabla L))
    $$

    Args:
      inner: Any Optax optimizer.
      sparsity: As in `rigl`.
      structure: As in `rigl`.
      initial_masks: As in `rigl`.
      seed: Seeds the masks, as in `rigl`: the same seed gives the same masks.

    Returns:
      A transformation whose state is a `SparseState`.

    Raises:
      ValueError: As `rigl` does for sparsity and masks.

    Examples:
      >>> import jax.numpy as jnp, optax, rigl_optax
      >>> tx = rigl_optax.static_sparse(optax.sgd(0.1), 0.9)
      >>> int(rigl_optax.get_masks(tx.init({"kernel": jnp.ones((10, 10))}))["kernel"].sum())
      10

    References:
      Evci et al., [Rigging the Lottery: Making All Tickets
      Winners](https://arxiv.org/abs/1911.11134), 2020, section 4.
    """
    method = Method(None, lambda inputs: Decision(inputs.masks), transposes=True)
    return _transform.sparse_transform(
        inner, sparsity, method, initial_masks=initial_masks, seed=seed, structure=structure
    )
