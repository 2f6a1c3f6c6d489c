"""MEST: drop by magnitude and gradient together, grow at random."""

import jax.numpy as jnp
import optax

from rigl_optax import _numbers
from rigl_optax._ranking._scores import add_scores
from rigl_optax._ranking._top_k import magnitude_scores
from rigl_optax._structures import UNSTRUCTURED, Structures
from rigl_optax._types import Arrays, Overrides, PyTree, Seed, Sparsity
from rigl_optax._wrapper._method import RewiringInputs
from rigl_optax._wrapper._newborn import AT_REST, Grown
from rigl_optax.methods import _drop_and_grow


def mest(
    inner: optax.GradientTransformation,
    sparsity: Sparsity | None,
    *,
    end: int,
    every: int = 100,
    begin: int = 0,
    drop_fraction: float | optax.Schedule = 0.3,
    gradient_weight: float = 1.0,
    overrides: Overrides | None = None,
    gradient_step: bool = False,
    min_fan_in: int = 0,
    grown: Grown = AT_REST,
    structure: Structures = UNSTRUCTURED,
    initial_masks: PyTree | None = None,
    seed: Seed = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Memory-economic sparse training (MEST): as SET, but a weight that still learns stays.

    $$
    \begin{aligned}
    k &= \mathrm{int32}(n \cdot f(t)) \\
    K &= \text{the } n - k \text{ active weights of largest }
        |\theta| + \lambda |\nabla_\theta L| \\
    G &= k \text{ positions outside } K \text{, uniformly at random}
    \end{aligned}
    $$

    A small weight with a large gradient is about to change, and is kept. Only gradients of active
    weights matter, so that no step needs a dense gradient. This is the paper's elastic mutation
    (EM), without its soft memory bound.

    Args:
      inner: As in `rigl`.
      sparsity: As in `rigl`.
      end: As in `rigl`.
      every: As in `rigl`.
      begin: As in `rigl`.
      drop_fraction: As in `rigl`; the paper lowers it in steps.
      gradient_weight: $\lambda$, at least 0; 0 is SET.
      overrides: As in `rigl`.
      gradient_step: As in `rigl`.
      min_fan_in: As in `rigl`.
      grown: As in `rigl`.
      structure: As in `rigl`; magnitudes and gradients of a group are pooled, then added.
      initial_masks: As in `rigl`.
      seed: Seeds the initial masks and the growth, in separate streams.

    Returns:
      A transformation whose state is a `SparseState`.

    Raises:
      ValueError: As `rigl` does; if `gradient_weight` is not a finite number of at least 0.

    Examples:
      >>> import jax.numpy as jnp, optax, rigl_optax
      >>> tx = rigl_optax.mest(optax.sgd(0.1, momentum=0.9), 0.9, end=1_000)
      >>> int(rigl_optax.get_masks(tx.init({"kernel": jnp.ones((10, 10))}))["kernel"].sum())
      10

    References:
      Yuan et al., [MEST: Accurate and fast memory-economic sparse training framework on the
      edge](https://arxiv.org/abs/2110.14032), 2021, section 3.
    """
    weight = _numbers.real("gradient_weight", gradient_weight)
    if not 0 <= weight < float("inf"):
        raise ValueError(f"gradient_weight={weight}: must be a finite number of at least 0")

    def keep_scores(inputs: RewiringInputs) -> Arrays:
        pairs = zip(inputs.weights, inputs.gradients, strict=True)
        # The sum of floats would depend on what the compiler fuses.
        return [
            add_scores(magnitude_scores(w), magnitude_scores(jnp.float32(weight) * g))
            for w, g in pairs
        ]

    return _drop_and_grow.drop_and_grow(
        inner,
        sparsity,
        keep_scores=keep_scores,
        grow_scores=_drop_and_grow.grow_at_random(seed),
        needs_signal=False,
        end=end,
        every=every,
        begin=begin,
        drop_fraction=drop_fraction,
        overrides=overrides,
        gradient_step=gradient_step,
        min_fan_in=min_fan_in,
        grown=grown,
        structure=structure,
        initial_masks=initial_masks,
        seed=seed,
    )
