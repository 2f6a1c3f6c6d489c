"""Implements iterative hard thresholding: after every step only the largest weights stay."""

import numpy as np
import optax

from rigl_optax import _layout, _numbers, _plan
from rigl_optax._ranking import _top_k
from rigl_optax._structures import UNSTRUCTURED, Structures
from rigl_optax._types import Arrays, PyTree, Seed, Sparsity
from rigl_optax._wrapper import _transform
from rigl_optax._wrapper._method import Decision, Method, RewiringInputs, Shadow
from rigl_optax.methods import _drop_and_grow, _falling, _min_fan_in, shadow


def iterative_hard_thresholding(
    inner: optax.GradientTransformation,
    sparsity: Sparsity,
    *,
    end: int,
    every: int = 1,
    begin: int = 0,
    min_fan_in: int = 0,
    initial_sparsity: Sparsity = 0.0,
    structure: Structures = UNSTRUCTURED,
    initial_masks: PyTree | None = None,
    seed: Seed = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Iterative hard thresholding (IHT): all weights take each step, the largest stay.

    Use it if the network is to be as sparse as can be and only the result counts, as for
    weight-sparse transformers that people read: it is what they were trained with, at 99 to
    99.9 %. Gradient and optimizer state are dense at every step; so memory and backward pass cost
    what a dense network costs. `dnw` is its relative whose inactive weights live on; here they are
    forgotten, and a weight comes back only if a single step makes it large enough.

    With $z^0_l$ zeros in layer l at the start and $z^f_l$ in the end, at the steps
    $t_0 = begin, ...$ up to $t_1$, the last one before `end`,

    $$
    \begin{aligned}
    w &= \theta_t + \mathrm{inner}(\nabla_\theta L(\theta_t)) \\
    z_l(t) &= z^0_l + \left\lfloor (z^f_l - z^0_l) \min\left(1,
        \frac{t - t_0}{t_1 - t_0}\right) \right\rfloor \\
    \theta_{t+1} &= w \odot [\,|w| \text{ among the } N_l - z_l(t) \text{ largest of its layer}\,]
    \end{aligned}
    $$

    where the share of the way is rounded down to a multiple of 1 / 32,768, so that numbers are the
    same on any number of devices. After `end` the masks go on being renewed, with the final number
    of zeros. Before `begin` they are those of the start: by default nothing is inactive.

    By default a layer is a kernel, and biases, embeddings and normalisations stay dense. To make
    all arrays equally sparse, as the paper does, give
    `uniform(0.99, dense=rigl_optax.nothing_dense)`; in a config,
    `config.model.dense_layers = "nothing"` with the distribution `uniform`.

    Args:
      inner: As in `rigl`; it sees all gradients, and weights that are 0 where they are inactive.
        The paper's is AdamW.
      sparsity: Final sparsity, as in `rigl`.
      end: The last renewal before it is the first at the final sparsity. The paper's sparsity
        rises in the first half of training.
      every: Steps between renewals; 1 in the paper. In between all weights take each step, and
        those that are inactive are set back to 0.
      begin: Count of the first renewal; it removes nothing, since the line starts there.
      min_fan_in: Each unit keeps at least this many inputs, its largest weights.
      initial_sparsity: As in `gradual_magnitude_pruning`.
      structure: As in `rigl`.
      initial_masks: As in `gradual_magnitude_pruning`.
      seed: As in `rigl`; it matters only if `initial_sparsity` is above 0.

    Returns:
      A transformation whose state is a `SparseState`; `memory.numbers` holds the numbers of
      active weights at the start, int32 [layers]. A renewal follows the gradient step.

    Raises:
      ValueError: As `gradual_magnitude_pruning` does; if `min_fan_in` does not fit the final
        numbers, or the structure.

    Examples:
      >>> import jax.numpy as jnp, optax, rigl_optax
      >>> params = {"kernel": jnp.arange(1.0, 9.0).reshape(4, 2), "bias": jnp.ones(2)}
      >>> all_arrays = rigl_optax.uniform(0.5, dense=rigl_optax.nothing_dense)
      >>> tx = rigl_optax.iterative_hard_thresholding(optax.sgd(0.1), all_arrays, end=1)
      >>> grads = {"kernel": jnp.zeros((4, 2)), "bias": jnp.array([0.0, 1.0])}
      >>> updates, _ = tx.update(grads, tx.init(params), params)
      >>> new = optax.apply_updates(params, updates)
      >>> (new["kernel"] != 0).sum(1).tolist(), new["bias"].tolist()
      ([0, 0, 2, 2], [1.0, 0.0])

    References:
      Gao et al., [Weight-sparse transformers have interpretable
      circuits](https://arxiv.org/abs/2511.13653), 2025, appendix A.2; Blumensath and Davies,
      [Iterative hard thresholding for compressed sensing](https://arxiv.org/abs/0805.0510), 2009.
    """
    steps = _plan.rewiring_plan(begin=begin, end=end, every=every).default.schedule.steps()
    active_at = _falling.linear_active_counts(steps)
    min_fan_in = _numbers.integer("min_fan_in", min_fan_in, least=0)
    check_start = _falling.check_start("layer", initial_masks)

    def check(layout: _layout.Layout, start: _layout.Layout) -> None:
        check_start(layout, start)
        if min_fan_in:
            _min_fan_in.check(layout, min_fan_in)

    def rule(inputs: RewiringInputs) -> Decision:
        packing = inputs.packing
        scores = [_top_k.magnitude_scores(w) for w in inputs.weights]
        scores = _drop_and_grow.without_padding(scores, packing)
        if min_fan_in:
            scores = _min_fan_in.protected(scores, inputs.leaves, packing, min_fan_in)
        return Decision(_falling.largest(inputs, scores, active_at(inputs), "layer"))

    # Masks follow the weights as long as training lasts.
    last = int(np.iinfo(np.int32).max)
    method = Method(
        _plan.rewiring_plan(begin=begin, end=last, every=every),
        rule,
        start=_falling.active_at_start,
        shadow=Shadow(_all, shadow.settled, shadow.shown, stored=False),
        check=check,
        progress=_falling.progress(steps, 1.0),
    )
    return _transform.sparse_transform(
        inner,
        _falling.needed(sparsity),
        method,
        initial_masks=initial_masks,
        seed=seed,
        structure=structure,
        initial_sparsity=_layout.at_start(initial_sparsity, sparsity, "initial_sparsity"),
    )


def _all(inputs: RewiringInputs) -> Arrays:
    """Returns the gradients of all weights: those that are inactive are moved too."""
    return inputs.gradients
