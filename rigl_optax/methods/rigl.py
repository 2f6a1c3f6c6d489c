"""RigL: drop by magnitude, grow by gradient."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from rigl_optax import _numbers, _schedules
from rigl_optax._structures import UNSTRUCTURED, Structures
from rigl_optax._types import Overrides, PyTree, Seed, Sparsity
from rigl_optax._wrapper import _transform
from rigl_optax._wrapper._newborn import AT_REST, Grown
from rigl_optax.methods import _drop_and_grow


def rigl(
    inner: optax.GradientTransformation,
    sparsity: Sparsity | None,
    *,
    end: int,
    every: int = 100,
    begin: int = 0,
    drop_fraction: float | optax.Schedule = 0.3,
    accumulate: int = 1,
    candidates: float | None = None,
    overrides: Overrides | None = None,
    gradient_step: bool = False,
    min_fan_in: int = 0,
    grown: Grown = AT_REST,
    structure: Structures = UNSTRUCTURED,
    initial_masks: PyTree | None = None,
    seed: Seed = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Trains sparse from the first step to the last: RigL around any optimizer.

    Use it if the network has to stay sparse throughout, with the same number of weights and FLOPs
    in each layer. It needs a dense gradient at rewirings only. Gradual pruning and `granet` are
    often more accurate, but train more weights; `sparse_evolutionary_training` needs no dense
    gradient, but explores at random.

    On an ordinary step `inner` sees the gradient of the active weights only. At
    `count = begin, begin + every, ...` while `count < end`, a rewiring replaces the
    gradient step. In each layer, with n active weights,

    $$
    \begin{aligned}
    k &= \mathrm{int32}(n \cdot f(t)) \\
    K &= \text{the } n - k \text{ active weights of largest } |\theta| \\
    G &= \text{the } k \text{ positions outside } K
         \text{ of largest } |\nabla_\theta L| \\
    \text{active} &\leftarrow K \cup G
    \end{aligned}
    $$

    where the gradient is dense: with respect to all weights, at their sparse values. New weights
    start at 0, and their optimizer state starts at rest. A dropped weight may grow again in the
    same rewiring; then it keeps its value and its state. The number of active weights of a layer
    never changes; with a structure, the number of its active groups. If a dense gradient is not
    finite, all masks stay as they are. A layer whose gradients outside K are all 0 keeps its mask,
    and `uninformed` in the state counts it.

    After an update every inactive weight is exactly 0, whatever was done to `params` before, as
    long as no transformation scales or adds to these updates: put the wrapper last in a chain.

    Args:
      inner: Any Optax optimizer, with its schedules, decay and clipping.
      sparsity: Overall fraction of zeros in [0, 1), laid out by `erk`; or a distribution
        (`uniform(0.9)`, `erk(0.9, overrides=...)`); None only with `initial_masks`.
      end: T_end, in steps: no rewiring at `count >= end`. The paper stops at about 3/4 of
        training (25,000 of 32,000 steps on ImageNet).
      every: Delta T: steps between rewirings.
      begin: Count of the first rewiring.
      drop_fraction: Fraction of a layer's active weights to replace at a rewiring. A number is
        the start of a cosine that reaches 0 at `end`; or give any Optax schedule.
      accumulate: Number of calls, the rewiring step included, whose dense gradients are summed
        before growth; at most `every`. Gradients of small batches are noisy (at batch 1,024 the
        rigl-torch authors gain 0.3 to 1 % with several).
      candidates: $\gamma$ of guided stochastic exploration: $\mathrm{int32}(\gamma n)$ different
        positions of each layer are drawn at random, and only those of them that are inactive
        before the rewiring may grow; 1 in its paper. None for all positions, in which case dropped
        weights may grow again. Where fewer may grow than are dropped, less is dropped; under `NM`
        and `ConstantFanIn` parts that lack candidates grow others.
      overrides: Another `begin`, `end`, `every` or `drop_fraction` for some layers:
        `{"Dense_0": {"drop_fraction": 0.1}}`, with regular expressions searched in the path. On a
        rewiring step, layers that are not due keep their masks, and take no gradient step either.
      gradient_step: Whether weights that stay active take the gradient step on rewiring steps
        too; they are ranked by their values before it. In the paper a rewiring replaces the step.
      min_fan_in: Each unit keeps at least this many active inputs, its largest weights; units
        with fewer (random masks can have them) are grown first, by their gradients. If so much is
        dropped that not all of these weights can stay, units regrow up to it.
      grown: The value and the optimizer state that new weights start from; by default 0 and at
        rest.
      structure: Groups of weights that are active or inactive together, such as `Block(16, 16)`:
        one for all sparse layers, or `{"Dense_0": Block(16, 16)}`, where layers that no pattern
        matches are unstructured. All of the above then holds for groups instead of weights.
      initial_masks: Bool tree of the structure of params that replaces the random draw, copied at
        init; it decides on the numbers of active weights. Without a `sparsity` each leaf is one
        layer; if leaves are stacks of layers, give a distribution with `stacked` too.
      seed: Seeds the initial masks; in [0, 2**32). Do not derive it from the key of the model's
        weights. Two transformations in one `optax.partition` draw the same masks for leaves of
        the same shape and position, unless their seeds differ.

    Returns:
      A transformation whose state is a `SparseState`.

    Raises:
      ValueError: If a sparsity is outside [0, 1), `end <= begin`, `every < 1`, a drop fraction is
        outside [0, 1], `accumulate` is outside [1, every], or `candidates` is not above 0 or given
        with `min_fan_in`, which could not be kept; at `init`, if a pattern matches
        nothing, nothing is left to sparsify, or initial masks do not fit.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, rigl_optax
      >>> params = {"Dense_0": {"kernel": jnp.ones((8, 16)), "bias": jnp.zeros(16)}}
      >>> tx = rigl_optax.rigl(optax.sgd(0.1, momentum=0.9), sparsity=0.75, end=1_000)
      >>> opt_state = tx.init(params)
      >>> params = rigl_optax.apply_masks(params, opt_state)
      >>> grads = jax.tree.map(jnp.ones_like, params)
      >>> updates, opt_state = tx.update(grads, opt_state, params)
      >>> params = optax.apply_updates(params, updates)
      >>> int((params["Dense_0"]["kernel"] != 0).sum()), int(opt_state.rewirings)
      (23, 1)

    References:
      Evci et al., [Rigging the Lottery: Making All Tickets
      Winners](https://arxiv.org/abs/1911.11134), 2020, algorithm 1; `candidates`: Heddes et al.,
      [Always-sparse training by growing connections with guided stochastic
      exploration](https://arxiv.org/abs/2401.06898), 2024.
    """
    grow_scores: _drop_and_grow.Scores = _drop_and_grow.grow_by_gradient
    if candidates is not None:
        ratio = check_candidates(candidates, min_fan_in)
        grow_scores = _drop_and_grow.grow_among_candidates(grow_scores, ratio, seed)
    method = _drop_and_grow.drop_and_grow_method(
        grow_scores,
        end=end,
        every=every,
        begin=begin,
        drop_fraction=drop_fraction,
        overrides=overrides,
        gradient_step=gradient_step,
        min_fan_in=min_fan_in,
        grown=grown,
        seed=seed,
        may_refuse=candidates is not None,
        remember=_accumulation(accumulate, begin, end, every, bool(overrides)),
    )
    if method.plan is not None:
        method = method._replace(plan=method.plan._replace(window=accumulate))
    return _transform.sparse_transform(
        inner, sparsity, method, initial_masks=initial_masks, seed=seed, structure=structure
    )


def check_candidates(candidates: float, min_fan_in: int) -> float:
    """Checks the number of candidates for growth, for each active weight, and returns it.

    Raises:
      ValueError: If it is not a finite number above 0, or a least fan-in is to be kept.
    """
    ratio = _numbers.real("candidates", candidates)
    if not 0 < ratio < float("inf"):
        raise ValueError(f"candidates={ratio}: must be a finite number above 0")
    if min_fan_in:
        raise ValueError(
            f"candidates={ratio}, min_fan_in={min_fan_in}: a unit may have no candidate to grow"
        )
    return ratio


def _accumulation(
    number: int, begin: int, end: int, every: int, has_overrides: bool
) -> Callable[[jax.Array, jax.Array, jax.Array], jax.Array] | None:
    """Returns `remember(count, total, gradient) -> total`, which sums the last `number` gradients.

    The last of them is the rewiring step's own. Returns None if `number` is 1.

    Raises:
      ValueError: If `number` is outside [1, every], or above 1 with overrides.
    """
    schedule = _schedules.rewiring_schedule(begin=begin, end=end, every=every)
    begin, every = schedule.begin, schedule.every
    number = _numbers.integer("accumulate", number, what=f"an integer in [1, every={every}]")
    if not 1 <= number <= every:
        raise ValueError(f"accumulate={number}: must be an integer in [1, every={every}]")
    if number == 1:
        return None
    if has_overrides:
        raise ValueError(
            f"accumulate={number}: needs one schedule for all layers, without overrides"
        )

    def remember(count: jax.Array, total: jax.Array, gradient: jax.Array) -> jax.Array:
        # The place of this call in its window of `number` calls, from 0; a call between windows has
        # `number` or more, and adds nothing. With begin = 0 the first window is its last call only.
        done = (count - begin + number - 1) % every
        total = jnp.where(done == 0, 0, total)
        return jnp.where(done < number, total + gradient, total)

    return remember
