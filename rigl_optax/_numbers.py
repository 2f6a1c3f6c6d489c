"""Arguments that are numbers: Python's, or scalars of NumPy, which become Python's."""

import numbers
from typing import Any

import jax
import numpy as np


class WrongKindError(TypeError, ValueError):
    """A value of a wrong kind was given for a number."""


def integer(name: str, value: Any, *, least: int | None = None, what: str = "an integer") -> int:
    """A Python integer.

    Args:
      name: Of the argument, for errors.
      value: What was given.
      least: The smallest that is allowed.
      what: What it must be, for errors.

    Raises:
      TypeError: If it is no integer, or an array of JAX, whose value may not be known yet. It is
        a ValueError, too.
      ValueError: If it is less than `least`.
    """
    value = _scalar(name, value)
    what = what if least is None else f"{what} of at least {least}"
    if isinstance(value, bool | np.bool_) or not isinstance(value, numbers.Integral):
        raise WrongKindError(f"{name}={value!r}: must be {what}")
    if least is not None and value < least:
        raise ValueError(f"{name}={value}: must be {what}")
    return int(value)


def real(name: str, value: Any, what: str = "a number") -> float:
    """A Python float; raises as `integer` does. NaN and infinities are the caller's."""
    value = _scalar(name, value)
    if isinstance(value, bool | np.bool_) or not isinstance(value, numbers.Real):
        raise WrongKindError(f"{name}={value!r}: must be {what}")
    return float(value)


def _scalar(name: str, value: Any) -> Any:
    if isinstance(value, jax.Array):
        raise WrongKindError(
            f"{name}: is an array of JAX, must be a number of Python or NumPy, known before "
            "anything is traced. Under optax.inject_hyperparams name it in static_args, as all "
            f"numbers of a sparse method but seed: static_args=({name.split('[')[0]!r}, ...)"
        )
    return value.item() if isinstance(value, np.ndarray) and not value.ndim else value
