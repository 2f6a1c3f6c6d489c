"""When to rewire, and which fraction of the active weights to replace then.

A drop-fraction schedule is an ordinary Optax schedule: a function of the count
of `update` calls to a scalar in [0, 1].
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rigl_optax import _numbers


class RewiringSchedule(NamedTuple):
    """Rewire when `begin <= count < end` and `(count - begin) % every == 0`.

    The paper calls `every` Delta T and `end` T_end (section 3, "Update schedule").
    """

    begin: int
    end: int
    every: int

    def is_rewiring_step(self, count: jax.Array) -> jax.Array:
        """Tells whether the call with this `count` (int32 scalar) rewires: a bool scalar."""
        inside = (count >= self.begin) & (count < self.end)
        return inside & ((count - self.begin) % self.every == 0)

    def steps(self) -> range:
        """Lists all counts at which the topology is rewired."""
        return range(self.begin, self.end, self.every)


def rewiring_schedule(*, begin: int, end: int, every: int) -> RewiringSchedule:
    """Makes a `RewiringSchedule`, and checks it.

    Raises:
      TypeError: If an argument is not an integer.
      ValueError: If `begin < 0`, `every < 1`, or `end <= begin`: no step would rewire.
    """
    begin, end, every = (
        _numbers.integer(name, value, what="an integer number of steps")
        for name, value in (("begin", begin), ("end", end), ("every", every))
    )
    if begin < 0:
        raise ValueError(f"begin={begin}: the first rewiring step must be 0 or later")
    if every < 1:
        raise ValueError(f"every={every}: steps between rewirings must be 1 or more")
    if end <= begin:
        raise ValueError(
            f"end={end}, begin={begin}: rewiring happens at begin <= count < end, so with "
            "end <= begin it would never happen; for a fixed topology use static_sparse"
        )
    if end > np.iinfo(np.int32).max:
        raise ValueError(f"end={end}: counts are int32, at most {np.iinfo(np.int32).max}")
    return RewiringSchedule(begin, end, every)


def constant_drop_fraction(alpha: float) -> optax.Schedule:
    """Makes a schedule with the same drop fraction `alpha` at every rewiring."""
    return optax.constant_schedule(_fraction(alpha))


def cosine_drop_fraction(alpha: float, end: int, begin: int = 0) -> optax.Schedule:
    r"""Makes a cosine from `alpha` at `begin` to 0 at `end`, the paper's choice (equation 1).

    $$
    f(t) = \frac{\alpha}{2}
        \left(1 + \cos\frac{\pi (t - begin)}{end - begin}\right)
    $$

    Unlike in the reference code, the curve starts at `begin`, so that it ends at `end`.

    Args:
      alpha: The fraction at `begin`, in [0, 1].
      end: The count at which the fraction reaches 0.
      begin: The count at which the curve starts.

    Returns:
      A function of the count to a float32 scalar.

    Raises:
      ValueError: If `alpha` is outside [0, 1] or `end <= begin`.

    Examples:
      >>> schedule = cosine_drop_fraction(0.3, end=25_000)
      >>> round(float(schedule(12_500)), 6)
      0.15
    """
    alpha = _fraction(alpha)
    progress = _progress(end, begin)
    return lambda count: (
        jnp.float32(alpha / 2) * (1 + jnp.cos(jnp.float32(np.pi) * progress(count)))
    )


def linear_drop_fraction(alpha: float, end: int, begin: int = 0) -> optax.Schedule:
    """Makes a line from `alpha` at `begin` to 0 at `end` (paper, appendix G, k = 1)."""
    return inverse_power_drop_fraction(alpha, end, power=1.0, begin=begin)


def inverse_power_drop_fraction(
    alpha: float, end: int, power: float = 3.0, begin: int = 0
) -> optax.Schedule:
    r"""Makes an inverse power: `alpha * (1 - (t - begin) / (end - begin)) ** power`.

    The paper's appendix G tries `power` 1 and 3 (its figure calls 3 "exponential").

    Raises:
      ValueError: If `alpha` is outside [0, 1], `end <= begin`, or `power` is not above 0.
    """
    alpha = _fraction(alpha)
    power = _numbers.real("power", power)
    if not power > 0:
        raise ValueError(f"power={power}: must be above 0; for no decay use constant_drop_fraction")
    progress = _progress(end, begin)
    return lambda count: jnp.float32(alpha) * (1 - progress(count)) ** jnp.float32(power)


def as_drop_fraction(
    drop_fraction: float | optax.Schedule, schedule: RewiringSchedule
) -> optax.Schedule:
    """Makes of a float a cosine from it to 0 over `schedule`; takes a function as it is."""
    if callable(drop_fraction):
        return drop_fraction
    return cosine_drop_fraction(drop_fraction, schedule.end, schedule.begin)


def _progress(end: int, begin: int) -> optax.Schedule:
    end, begin = _numbers.integer("end", end), _numbers.integer("begin", begin)
    if end <= begin:
        raise ValueError(f"end={end}, begin={begin}: the fraction decays from begin to end > begin")

    def progress(count: jax.typing.ArrayLike) -> jax.Array:
        done = jnp.asarray(count, jnp.float32) - jnp.float32(begin)
        return jnp.clip(done / jnp.float32(end - begin), 0, 1)

    return progress


def _fraction(alpha: float) -> float:
    alpha = _numbers.real("drop_fraction", alpha, "a number in [0, 1] or an optax.Schedule")
    if not 0 <= alpha <= 1:
        raise ValueError(f"drop_fraction={alpha}: must be in [0, 1]")
    return alpha
