"""Adam with a step count for each weight, so that weights which grow late start like new ones."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

PyTree = Any


class ScaleByAdamState(NamedTuple):
    """State of `scale_by_adam`.

    Attributes:
      count: int32 scalar, calls so far.
      age: Tree like params of int16 or int32: steps of each weight since it became active.
      mu: First moments, a tree like params.
      nu: Second moments, a tree like params.
    """

    count: jax.Array  # type: ignore[assignment]
    age: PyTree
    mu: PyTree
    nu: PyTree


def scale_by_adam(
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    eps_root: float = 0.0,
    mu_dtype: jax.typing.DTypeLike | None = None,
    *,
    warmup: int = 20,
) -> optax.GradientTransformation:
    r"""Rescales updates as `optax.scale_by_adam`, with bias correction by the age of each weight.

    A weight that grows at step t starts with moments at rest. Optax corrects their bias by the
    count of the whole run, $1 - \beta_2^t$, which is nearly 1 by then, so that the second
    moment is far too small: for about a hundred steps the weight moves by several times the
    learning rate. Here the correction starts again with the weight, and its first steps are
    scaled down: with its age a,

    $$
    u = \min(1, a / \mathrm{warmup}) \,
        \frac{\hat\mu}{\sqrt{\hat\nu + \epsilon_0} + \epsilon}, \qquad
    \hat\mu = \frac{\mu}{1 - \beta_1^a}, \quad \hat\nu = \frac{\nu}{1 - \beta_2^a}
    $$

    Weights that have been active since the first call, and all weights of dense layers, have an
    age equal to the count: for them this is `optax.scale_by_adam` bit for bit, without a warm-up.

    Use it inside `rigl` and other methods that grow weights, when runs are long or b2 is near 1.
    Alone, outside of them, it is Optax's Adam with an array more.

    Args:
      b1: Decay rate of the first moment.
      b2: Decay rate of the second moment.
      eps: Added to the denominator, outside the square root.
      eps_root: Added inside the square root.
      mu_dtype: Of the first moment; None for that of the params.
      warmup: Steps over which the updates of a newly grown weight rise to their full size; 0 for
        none.

    Returns:
      A transformation. Its `age` takes 2 bytes a weight, 4 if `b2 ** 32767` is not yet negligible.

    Raises:
      ValueError: If `b1` or `b2` is outside [0, 1), or `warmup` is not an integer from 0 to 32,767.

    Examples:
      >>> import jax.numpy as jnp, optax, rigl_optax
      >>> inner = optax.chain(rigl_optax.scale_by_adam(), optax.scale_by_learning_rate(1e-3))
      >>> tx = rigl_optax.rigl(inner, 0.9, end=1_000)
      >>> tx.init({"kernel": jnp.ones((10, 10))}).inner_state[0].age["kernel"].dtype
      dtype('int16')
    """
    for name, decay in (("b1", b1), ("b2", b2)):
        if not 0 <= decay < 1:
            raise ValueError(f"{name}={decay}: must be in [0, 1)")
    most = jnp.iinfo(jnp.int16).max
    if isinstance(warmup, bool) or not isinstance(warmup, int) or not 0 <= warmup <= most:
        raise ValueError(f"warmup={warmup!r}: must be an integer from 0 to {most}")
    # Older weights need no correction in float32: their age need not be known exactly.
    is_short = max(b1, b2) ** most < jnp.finfo(jnp.float32).eps / 4
    age_dtype = jnp.int16 if is_short else jnp.int32

    def init_fn(params: PyTree) -> ScaleByAdamState:
        return ScaleByAdamState(
            count=jnp.zeros((), jnp.int32),
            age=optax.tree.zeros_like(params, dtype=age_dtype),
            mu=optax.tree.zeros_like(params, dtype=mu_dtype),
            nu=optax.tree.zeros_like(params),
        )

    def update_fn(
        updates: PyTree, state: ScaleByAdamState, params: PyTree | None = None
    ) -> tuple[PyTree, ScaleByAdamState]:
        del params
        mu = optax.tree.update_moment(updates, state.mu, b1, 1)
        nu = optax.tree.update_moment_per_elem_norm(updates, state.nu, b2, 2)
        count = optax.safe_increment(state.count)
        age = jax.tree.map(_older, state.age)
        bounded = jnp.minimum(count, jnp.iinfo(age_dtype).max).astype(age_dtype)

        def corrected(moment: jax.Array, age: jax.Array, decay: float) -> jax.Array:
            # The scalar as Optax computes it, so that weights of full age have the same bits.
            run = (1 - decay**count).astype(moment.dtype)
            own = (1 - jnp.float32(decay) ** age.astype(jnp.float32)).astype(moment.dtype)
            return moment / jnp.where(age == bounded, run, own)

        def step(m: jax.Array, v: jax.Array, age: jax.Array) -> jax.Array:
            m, v = corrected(m, age, b1), corrected(v, age, b2)
            update = m / (jnp.sqrt(v + eps_root) + eps)
            if not warmup:
                return update
            is_young = (age != bounded) & (age < warmup)
            part = age.astype(update.dtype) / jnp.asarray(warmup, update.dtype)
            return jnp.where(is_young, update * part, update)

        updates = jax.tree.map(step, mu, nu, age)
        mu, nu = optax.tree.cast(mu, mu_dtype), optax.tree.cast_like(nu, state.nu)
        return updates, ScaleByAdamState(count, age, mu, nu)

    return optax.GradientTransformation(init_fn, update_fn)


def adamw(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    eps_root: float = 0.0,
    mu_dtype: jax.typing.DTypeLike | None = None,
    weight_decay: float = 1e-4,
    mask: Any = None,
    *,
    warmup: int = 20,
) -> optax.GradientTransformation:
    """Builds AdamW, as `optax.adamw`, on `scale_by_adam` with an age for each weight.

    Args:
      learning_rate: A number, or a schedule of the count.
      b1: As in `scale_by_adam`.
      b2: As in `scale_by_adam`.
      eps: As in `scale_by_adam`.
      eps_root: As in `scale_by_adam`.
      mu_dtype: As in `scale_by_adam`.
      weight_decay: Decoupled weight decay, times the learning rate.
      mask: Which parameters decay, as in `optax.adamw`.
      warmup: As in `scale_by_adam`.

    Returns:
      A transformation, to be wrapped by a method: `rigl(adamw(1e-3), 0.9, end=1_000)`.

    Examples:
      >>> import rigl_optax
      >>> tx = rigl_optax.rigl(rigl_optax.adamw(1e-3, b2=0.95), 0.9, end=1_000)
    """
    return optax.chain(
        scale_by_adam(b1, b2, eps, eps_root, mu_dtype, warmup=warmup),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )


def _older(age: jax.Array) -> jax.Array:
    """One more, up to the largest that the dtype holds."""
    most = jnp.asarray(jnp.iinfo(age.dtype).max, age.dtype)
    return jnp.where(age < most, age + jnp.ones((), age.dtype), age)
