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
    overrides: Overrides | None = None,
    gradient_step: bool = False,
    min_fan_in: int = 0,
    grown: Grown = AT_REST,
    structure: Structures = UNSTRUCTURED,
    initial_masks: PyTree | None = None,
    seed: Seed = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Trains sparse from the first step to the last: RigL around any optimizer.

    On an ordinary step `inner` sees the gradient of the active weights only. At
    `count = begin, begin + every, ...` while `count < end`, a rewiring replaces the
    gradient step. In each layer, with n active weights,

    .. math::
        k &= \mathrm{int32}(n \cdot f(t)) \\
        K &= \text{the } n - k \text{ active weights of largest } |\theta| \\
        G &= \text{the } k \text{ positions outside } K
             \text{ of largest } |\nabla_\theta L| \\
        \text{active} &\leftarrow K \cup G

    where the gradient is the dense one: of the loss with respect to all weights, at their
    sparse values. New weights start at 0, with an optimizer state at rest; a weight that
    was dropped a moment ago may come back, with its value and state. The number of active
    weights of a layer never changes (with a structure that of its groups; `Block(pad=True)` has
    smaller ones). If a dense gradient is not finite, the topology stays. A layer whose gradients
    outside K are all 0 keeps its topology, and `uninformed` in the state counts it.

    Afterwards every inactive weight is exactly 0, whatever was done to `params` in between,
    as long as nothing scales or adds to these updates: the wrapper comes last in a chain.

    Args:
      inner: Any Optax optimizer, with its schedules, decay and clipping.
      sparsity: Overall fraction of zeros in [0, 1), laid out by `erk`; or a distribution
        (`uniform(0.9)`, `erk(0.9, overrides=...)`); None only with `initial_masks`.
      end: T_end: no rewiring at `count >= end`, in steps. The paper stops at about 3/4 of
        training (25,000 of 32,000 steps on ImageNet).
      every: Delta T, in steps between rewirings.
      begin: Count of the first rewiring.
      drop_fraction: Fraction of a layer's active weights to replace. A number is the start of
        a cosine that reaches 0 at `end`; or any Optax schedule.
      accumulate: Growth goes by the sum of the dense gradients of the last so many calls, the
        rewiring step's included; at most `every`. Small batches make for noisy growth
        (at batch 1,024, 0.3 to 1 % better with several, by the rigl-torch authors).
      overrides: For some layers another `begin`, `end`, `every` or `drop_fraction`: by regular
        expression, searched in the path, `{"Dense_0": {"drop_fraction": 0.1}}`. A layer
        whose turn it is not keeps its mask, and has no gradient step either.
      gradient_step: Whether weights that stay active take the gradient step on rewiring steps
        too. They are ranked as they were before it. In the paper a rewiring replaces it.
      min_fan_in: The least number of active inputs a unit is to have. Each unit keeps at least
        so many; units with fewer, as random masks may have, are grown first. They are its
        largest weights, unless so much is dropped that not all of these can stay: then what a
        unit lacks grows first, by its gradients.
      grown: What new weights start from, if not at 0 with an optimizer state at rest.
      structure: What lives and dies together, as `Block(16, 16)`: for all sparse layers, or by
        pattern, `{"Dense_0": Block(16, 16)}`, and the others unstructured. Groups take the place
        of weights in all of the above.
      initial_masks: Bool tree of the structure of params that replaces the random draw; the
        numbers of active weights are the masks' own. Copied at init. Without a `sparsity` each
        leaf is one layer; if some are stacks of layers, give the distribution that says so too.
      seed: Seeds the initial masks; in [0, 2**32). Not to be tied to the model's seed by
        sharing a key. Two transformations in one `optax.partition` draw the same masks for
        leaves of one shape and place unless their seeds differ.

    Returns:
      A transformation whose state is a `SparseState`.

    Raises:
      ValueError: On a sparsity outside [0, 1), `end <= begin`, `every < 1`, a drop fraction
        outside [0, 1], `accumulate` outside [1, every]; at `init`, if a pattern matches
        nothing, nothing is left to sparsify, or initial masks do not fit.

    Example:
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
      Evci et al., `Rigging the Lottery: Making All Tickets Winners
      <https://arxiv.org/abs/1911.11134>`_, 2020, algorithm 1.
    """
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
        remember=_accumulation(accumulate, begin, end, every, bool(overrides)),
    )
    if method.plan is not None:
        method = method._replace(plan=method.plan._replace(window=accumulate))
    return _transform.sparse_transform(
        inner, sparsity, method, initial_masks=initial_masks, seed=seed, structure=structure
    )


def _accumulation(
    number: int, begin: int, end: int, every: int, has_overrides: bool
) -> Callable[[jax.Array, jax.Array, jax.Array], jax.Array] | None:
    """Sums the gradients of the last `number` calls up to a rewiring."""
    schedule = _schedules.rewiring_schedule(begin=begin, end=end, every=every)
    begin, every = schedule.begin, schedule.every
    number = _numbers.integer("accumulate", number, what=f"an integer in [1, every={every}]")
    if not 1 <= number <= every:
        raise ValueError(f"accumulate={number}: must be an integer in [1, every={every}]")
    if number == 1:
        return None
    if has_overrides:
        raise ValueError("accumulate: needs one schedule for all layers, without overrides")

    def remember(count: jax.Array, total: jax.Array, gradient: jax.Array) -> jax.Array:
        # How many calls of the window are done before this one; at begin = 0, in none.
        done = (count - begin + number - 1) % every
        total = jnp.where(done == 0, 0, total)
        return jnp.where(done < number, total + gradient, total)

    return remember
