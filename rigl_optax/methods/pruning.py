"""Implements gradual magnitude pruning, and GraNet, which regrows weights as it prunes."""

import optax

from rigl_optax import _layout, _plan
from rigl_optax._ranking import _keep_and_grow, _top_k
from rigl_optax._structures import UNSTRUCTURED, Structures
from rigl_optax._types import PyTree, Seed, Sparsity
from rigl_optax._wrapper import _transform
from rigl_optax._wrapper._method import Decision, Method, RewiringInputs
from rigl_optax._wrapper._newborn import AT_REST, Grown
from rigl_optax.methods import _drop_and_grow, _falling


def gradual_magnitude_pruning(
    inner: optax.GradientTransformation,
    sparsity: Sparsity,
    *,
    end: int,
    every: int = 100,
    begin: int = 0,
    power: float = 3.0,
    scope: _falling.Scope = "layer",
    initial_sparsity: Sparsity = 0.0,
    gradient_step: bool = False,
    structure: Structures = UNSTRUCTURED,
    initial_masks: PyTree | None = None,
    seed: Seed = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Gradual magnitude pruning (Zhu and Gupta): from dense to sparse on a cubic schedule.

    Use it if the network has to be sparse at the end only: it is a strong baseline, at the cost of
    a mostly dense training. `granet` starts sparser and costs less.

    With $z^0_l$ zeros in layer l at the start and $z^f_l$ in the end, at the
    rewirings $t_0 = begin, ..., t_1$, the last one before `end`,

    $$
    \begin{aligned}
    z_l(t) &= z^0_l + \left\lfloor (z^f_l - z^0_l)
        \left(1 - \left(1 - \frac{t - t_0}{t_1 - t_0}\right)^p\right) \right\rfloor \\
    \text{active} &\leftarrow \text{the } N_l - z_l(t)
        \text{ active weights of largest } |\theta|
    \end{aligned}
    $$

    in each layer. With `scope="global"` the $\sum_l (N_l - z_l(t))$ largest weights of all
    layers together stay active, and the largest of each layer in any case, so no layer is ever
    emptied. A pruned weight is 0 and stays so. The last rewiring reaches the final numbers exactly.

    Args:
      inner: As in `rigl`.
      sparsity: Final sparsity, as in `rigl`; the published runs use `uniform(s)`.
      end: No pruning at `count >= end`.
      every: Steps between prunings (1,000 of 32,000 in the RigL paper's accounting).
      begin: Count of the first pruning; it removes nothing, since the curve starts there.
      power: p; 3 in the paper.
      scope: `layer` prunes each layer to its sparsity in the distribution; `global` ranks all
        layers together, and the distribution decides on the total only.
      initial_sparsity: Sparsity at the start: a number, laid out as `sparsity` is, or a
        distribution. If it is above 0, the masks at the start are random.
      gradient_step: As in `rigl`; True is closest to the reference code.
      structure: As in `rigl`.
      initial_masks: Masks to start from, for a warm start; their zeros are $z^0_l$.
      seed: As in `rigl`.

    Returns:
      A transformation whose state is a `SparseState`; `memory.numbers` holds the numbers of
      active weights at the start, int32 [layers].

    Raises:
      ValueError: As `rigl` does; if the initial sparsity is above the final one, in a layer or,
        with `scope="global"`, in all layers together.

    Examples:
      >>> import jax.numpy as jnp, optax, rigl_optax
      >>> tx = rigl_optax.gradual_magnitude_pruning(optax.sgd(0.1), 0.9, end=1_000)
      >>> int(rigl_optax.get_masks(tx.init({"kernel": jnp.ones((10, 10))}))["kernel"].sum())
      100

    References:
      Zhu and Gupta, [To prune, or not to prune](https://arxiv.org/abs/1710.01878), 2017.
    """
    plan = _plan.rewiring_plan(begin=begin, end=end, every=every)
    prune = _falling.pruning(plan.default.schedule.steps(), power, scope)

    def rule(inputs: RewiringInputs) -> Decision:
        return Decision(prune(inputs))

    method = Method(
        plan,
        rule,
        replaces_step=not gradient_step,
        start=_falling.active_at_start,
        check=_falling.check_start(scope, initial_masks),
        progress=_falling.progress(plan.default.schedule.steps(), power),
        moves_between_layers=scope == "global",
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


def granet(
    inner: optax.GradientTransformation,
    sparsity: Sparsity,
    *,
    end: int,
    every: int = 100,
    begin: int = 0,
    drop_fraction: float | optax.Schedule = 0.3,
    power: float = 3.0,
    scope: _falling.Scope = "global",
    initial_sparsity: Sparsity = 0.5,
    gradient_step: bool = False,
    grown: Grown = AT_REST,
    structure: Structures = UNSTRUCTURED,
    initial_masks: PyTree | None = None,
    seed: Seed = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""GraNet: gradual pruning, with RigL's drop and grow at each pruning.

    Use it if training may start denser than it ends: it is among the most accurate methods here
    (docs/results.md) at less cost than `gradual_magnitude_pruning`. `rigl` is at the final sparsity
    from the first step.

    A rewiring first prunes as `gradual_magnitude_pruning` does; then, with $n_l$ weights left
    in layer l,

    $$
    \begin{aligned}
    K_l &= \text{the } n_l - k_l \text{ of largest } |\theta| \text{ that are left},
        \quad k_l = \mathrm{int32}(n_l \cdot f(t)) \\
    G_l &= \text{the } k_l \text{ positions outside } K_l
        \text{ of largest } |\nabla_\theta L|
    \end{aligned}
    $$

    A weight that was just pruned may grow again. With `NM` and `ConstantFanIn`, $K_l$ is
    chosen in the whole layer, and each part of it grows as many as it lost. Training starts dense
    with `initial_sparsity=0`; 0.5 is the paper's sparse-to-sparse variant.

    Args:
      inner: As in `rigl`.
      sparsity: Final sparsity, as in `rigl`.
      end: As in `rigl`; the pruning ends there too.
      every: As in `rigl`.
      begin: As in `rigl`.
      drop_fraction: As in `rigl`; the GraNet paper starts at 0.5.
      power: As in `gradual_magnitude_pruning`.
      scope: As in `gradual_magnitude_pruning`; the paper's code uses `global`.
      initial_sparsity: As in `gradual_magnitude_pruning`.
      gradient_step: As in `rigl`.
      grown: As in `rigl`.
      structure: As in `rigl`.
      initial_masks: As in `gradual_magnitude_pruning`.
      seed: As in `rigl`.

    Returns:
      A transformation whose state is a `SparseState`, as `gradual_magnitude_pruning` does.

    Raises:
      ValueError: As `gradual_magnitude_pruning` does.

    Examples:
      >>> import jax.numpy as jnp, optax, rigl_optax
      >>> tx = rigl_optax.granet(optax.sgd(0.1), 0.9, end=1_000)
      >>> int(rigl_optax.get_masks(tx.init({"kernel": jnp.ones((10, 10))}))["kernel"].sum())
      50

    References:
      Liu et al., [Sparse training via boosting pruning plasticity with
      neuroregeneration](https://arxiv.org/abs/2106.10404), 2021.
    """
    plan = _plan.rewiring_plan(begin=begin, end=end, every=every, drop_fraction=drop_fraction)
    grown.check()
    prune = _falling.pruning(plan.default.schedule.steps(), power, scope)

    def rule(inputs: RewiringInputs) -> Decision:
        ranking_ids = inputs.packing.ranking_ids
        left = prune(inputs)
        has_parts = any(leaf.structure.has_parts for leaf in inputs.leaves)
        layers = _layout.layer_ids(inputs.leaves) if has_parts else ranking_ids
        active = _top_k.counts(left, layers)
        dropped = _keep_and_grow.drop_counts(active, plan.default.drop_fraction(inputs.count))
        scores = _keep_and_grow.drop_scores(inputs.weights, left)
        growth = _drop_and_grow.grow_by_gradient(inputs)
        if has_parts:
            kept = _top_k.top_k(scores, layers, active - dropped)
            wanted = _top_k.counts_by_row(left, ranking_ids)
            grown = _keep_and_grow.unless_uninformed(
                _drop_and_grow.regrown_in_parts(kept, growth, ranking_ids, wanted),
                left,
                _keep_and_grow.signals(kept, growth, layers),
                dropped,
                layers,
            )
        else:
            keep = active - dropped
            grown = _keep_and_grow.keep_and_grow_by_signal(
                left,
                scores,
                growth,
                ranking_ids,
                keep,
                dropped,
                dropped=dropped,
                layers=ranking_ids,
            )
        return Decision(grown.masks, uninformed=grown.uninformed)

    method = Method(
        plan,
        rule,
        replaces_step=not gradient_step,
        start=_falling.active_at_start,
        grown_values=grown.values(seed),
        keeps_initial=grown.value == "initial",
        grown_state=grown.state,
        check=_falling.check_start(scope, initial_masks),
        progress=_falling.progress(plan.default.schedule.steps(), power),
        moves_between_layers=scope == "global",
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
