"""MEST: drop by magnitude and gradient together, grow at random."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rigl_optax import _layout, _numbers, _plan
from rigl_optax._ranking import _keep_and_grow, _top_k
from rigl_optax._ranking._scores import add_scores
from rigl_optax._ranking._top_k import magnitude_scores
from rigl_optax._structures import UNSTRUCTURED, Structures
from rigl_optax._types import Arrays, Overrides, PyTree, Seed, Sparsity
from rigl_optax._wrapper import _transform
from rigl_optax._wrapper._method import Decision, Method, RewiringInputs
from rigl_optax._wrapper._newborn import AT_REST, Grown
from rigl_optax.methods import _drop_and_grow, _falling, _min_fan_in


def mest(
    inner: optax.GradientTransformation,
    sparsity: Sparsity | None,
    *,
    end: int,
    every: int = 100,
    begin: int = 0,
    drop_fraction: float | optax.Schedule = 0.3,
    gradient_weight: float = 1.0,
    soft: bool = False,
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
    (EM).

    With `soft` (EM&S, a soft memory bound) weights grow first and are dropped at the next rewiring,
    so that new ones are trained before they compete. With n active weights at the start,

    $$
    \begin{aligned}
    K &= \text{the } n \text{ active weights of largest } |\theta| + \lambda |\nabla_\theta L| \\
    G &= \mathrm{int32}(n \cdot f(t)) \text{ positions outside } K \text{, uniformly at random; none
        at the last rewiring}
    \end{aligned}
    $$

    In between a layer has up to $1 + f(t)$ times its weights, as `explain` reports; training FLOPs
    count them. Should the last rewiring fail, on gradients that are not finite, they stay.

    Use it if growth must not need gradients of inactive weights, as on small devices. To let the
    share that is replaced fall by stages, as in the paper, give
    `drop_fraction=optax.piecewise_constant_schedule(0.3, {8_000: 0.5, 16_000: 0.5})`; in a config,
    `config.method.drop_schedule = "stages"`.

    Args:
      inner: As in `rigl`.
      sparsity: As in `rigl`.
      end: As in `rigl`.
      every: As in `rigl`.
      begin: As in `rigl`.
      drop_fraction: As in `rigl`. With `soft` it bounds what is active: at a density of 0.1, a
        fraction of 0.1 to 0.2 lets it rise by 1 to 2 % of all weights.
      gradient_weight: $\lambda$, at least 0; 0 is SET.
      soft: Whether weights grow at one rewiring and are dropped at the next.
      overrides: As in `rigl`; not with `soft`.
      gradient_step: As in `rigl`.
      min_fan_in: As in `rigl`.
      grown: As in `rigl`.
      structure: As in `rigl`; magnitudes and gradients of a group are pooled, then added. `NM` and
        `ConstantFanIn` fix numbers, so not with `soft`.
      initial_masks: As in `rigl`.
      seed: Seeds the initial masks and the growth, in separate streams.

    Returns:
      A transformation whose state is a `SparseState`.

    Raises:
      ValueError: As `rigl` does; if `gradient_weight` is not a finite number of at least 0; if
        `soft` is given with `overrides`, or with a structure that fixes numbers.

    Examples:
      >>> import jax.numpy as jnp, optax, rigl_optax
      >>> tx = rigl_optax.mest(optax.sgd(0.1, momentum=0.9), 0.9, end=1_000)
      >>> int(rigl_optax.get_masks(tx.init({"kernel": jnp.ones((10, 10))}))["kernel"].sum())
      10

    References:
      Yuan et al., [MEST: Accurate and fast memory-economic sparse training framework on the
      edge](https://arxiv.org/abs/2110.14032), 2021, section 3.
    """
    keep_scores = keep_by_magnitude_and_gradient(gradient_weight)
    if soft:
        if overrides:
            raise ValueError("soft=True: needs one schedule for all layers, without overrides")
        method = _soft_method(
            keep_scores,
            _plan.rewiring_plan(begin=begin, end=end, every=every, drop_fraction=drop_fraction),
            gradient_step,
            _numbers.integer("min_fan_in", min_fan_in, least=0),
            grown,
            seed,
        )
        return _transform.sparse_transform(
            inner, sparsity, method, initial_masks=initial_masks, seed=seed, structure=structure
        )
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


def keep_by_magnitude_and_gradient(gradient_weight: float) -> _drop_and_grow.Scores:
    r"""Makes scores $|\theta| + \lambda |\nabla_\theta L|$ of active weights.

    Args:
      gradient_weight: $\lambda$.

    Raises:
      ValueError: If it is not a finite number of at least 0.
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

    return keep_scores


def _soft_method(
    keep_scores: _drop_and_grow.Scores,
    plan: _plan.RewiringPlan,
    gradient_step: bool,
    min_fan_in: int,
    grown: Grown,
    seed: Seed,
) -> Method:
    """Makes the method that drops what is above the number at the start, then grows.

    Args:
      keep_scores: Of active weights.
      plan: Without overrides.
      gradient_step: As in `mest`, and so the others.
      min_fan_in: How many inputs each unit keeps.
      grown: How new weights start.
      seed: Of the growth.
    """
    grown.check()
    grow_scores = _drop_and_grow.grow_at_random(seed)
    last = plan.default.schedule.steps()[-1]

    def check(layout: _layout.Layout, start: _layout.Layout) -> None:
        for leaf in layout.sparse:
            if leaf.structure.has_parts:
                raise ValueError(
                    f"soft=True: {leaf.path!r} has {leaf.structure}, which fixes how many weights "
                    "each part of a layer has"
                )
        if min_fan_in:
            _min_fan_in.check(start, min_fan_in)

    def rule(inputs: RewiringInputs) -> Decision:
        packing, rows = inputs.packing, inputs.packing.ranking_ids
        # Traced initial masks may differ from those that `init` counted.
        keep = jnp.minimum(inputs.active(), inputs.numbers)
        fraction = plan.default.drop_fraction(inputs.count)
        room = jnp.asarray(packing.sizes()) - keep
        grow = jnp.minimum(_keep_and_grow.drop_counts(inputs.numbers, fraction), room)
        grow = jnp.where(inputs.count >= last, 0, grow)
        pairs = zip(inputs.masks, keep_scores(inputs), strict=True)
        to_keep = [jnp.where(m, s, jnp.int32(_top_k.EXCLUDED)) for m, s in pairs]
        to_grow, prefer = grow_scores(inputs), None
        if min_fan_in:
            to_keep = _min_fan_in.protected(to_keep, inputs.leaves, packing, min_fan_in)
            prefer = _min_fan_in.preferred(to_grow, inputs.leaves, packing, min_fan_in)
        return Decision(_keep_and_grow.keep_and_grow(to_keep, to_grow, rows, keep, grow, prefer))

    steps = plan.default.schedule.steps()

    @functools.cache
    def fractions() -> list[float]:
        counts = jnp.arange(steps.start, steps.stop, steps.step, dtype=jnp.int32)
        found = jax.vmap(lambda t: jnp.asarray(plan.default.drop_fraction(t), jnp.float32))(counts)
        return [float(x) for x in np.clip(np.asarray(found), 0, 1)]

    def excess(count: int) -> float:
        if not steps[0] <= count < last:
            return 0.0
        return fractions()[(count - steps[0]) // steps.step]

    return Method(
        plan,
        rule,
        replaces_step=not gradient_step,
        start=_falling.active_at_start,
        grown_values=grown.values(seed),
        keeps_initial=grown.value == "initial",
        grown_state=grown.state,
        check=check,
        excess=excess,
    )
