"""Implements SPDF, which trains a sparse network and goes on with a dense one."""

import jax.numpy as jnp
import optax

from rigl_optax import _numbers, _plan
from rigl_optax._layout import Layout
from rigl_optax._structures import UNSTRUCTURED, Structures
from rigl_optax._types import PyTree, Seed, Sparsity
from rigl_optax._wrapper import _transform
from rigl_optax._wrapper._method import Decision, Method, RewiringInputs


def spdf(
    inner: optax.GradientTransformation,
    sparsity: Sparsity | None,
    *,
    dense_from: int,
    gradient_step: bool = False,
    structure: Structures = UNSTRUCTURED,
    initial_masks: PyTree | None = None,
    seed: Seed = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Sparse pre-training and dense fine-tuning (SPDF): fixed masks first, then all weights.

    Use it if pre-training is to cost less, and the network may be dense in the end: its capacity is
    needed for what it is fine-tuned on. `acdc` does the opposite and ends sparse.

    $$
    \text{active} = \begin{cases}
        \text{the first masks} & t \le t_d \\
        \text{all} & t > t_d \end{cases}, \qquad t_d = dense\_from
    $$

    At the change weights that were inactive start at 0, with an optimizer state at rest; the
    others go on. To fine-tune on other data or at another learning rate, let schedules of
    `inner` change at the same count.

    Args:
      inner: As in `rigl`.
      sparsity: Of the first masks, as in `rigl`; the paper goes up to 0.75.
      dense_from: Count of the call that makes all weights active.
      gradient_step: As in `rigl`: whether that call takes a gradient step too.
      structure: As in `rigl`.
      initial_masks: As in `rigl`: those of any sparse run.
      seed: As in `rigl`.

    Returns:
      A transformation whose state is a `SparseState`.

    Raises:
      ValueError: As `rigl` does; if `dense_from` is below 0.

    Examples:
      >>> import jax.numpy as jnp, optax, rigl_optax
      >>> params = {"kernel": jnp.ones((10, 10))}
      >>> tx = rigl_optax.spdf(optax.sgd(0.1), 0.75, dense_from=1)
      >>> state, active = tx.init(params), []
      >>> for _ in range(2):
      ...     _, state = tx.update({"kernel": jnp.ones((10, 10))}, state, params)
      ...     active.append(int(state.masks["kernel"].sum()))
      >>> active
      [25, 100]

    References:
      Thangarasa et al., [SPDF: Sparse pre-training and dense fine-tuning for large language
      models](https://arxiv.org/abs/2303.10464), 2023.
    """
    count = _numbers.integer("dense_from", dense_from, least=0)

    def rule(inputs: RewiringInputs) -> Decision:
        return Decision([jnp.ones_like(m) for m in inputs.masks])

    def final(layout: Layout) -> Layout:
        return layout._replace(sparse=[leaf._replace(zeros=0) for leaf in layout.sparse])

    method = Method(
        _plan.rewiring_plan(begin=count, end=count + 1, every=1),
        rule,
        replaces_step=not gradient_step,
        progress=lambda done: float(done >= count),
        final=final,
    )
    return _transform.sparse_transform(
        inner, sparsity, method, initial_masks=initial_masks, seed=seed, structure=structure
    )
