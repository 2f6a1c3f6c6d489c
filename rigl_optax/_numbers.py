"""Checks arguments that must be numbers, and returns them as Python numbers."""

import numbers
from typing import Any

import jax
import numpy as np


class WrongKindError(TypeError, ValueError):
    """Raised if a number was expected and something else was given."""


def integer(name: str, value: Any, *, least: int | None = None, what: str = "an integer") -> int:
    """Returns `value` as a Python integer.

    Args:
      name: Name of the argument, for errors.
      value: The given value: an integer of Python or NumPy.
      least: The smallest allowed value, if there is one.
      what: Says in errors what the value must be.

    Raises:
      TypeError: If it is not an integer, or is an array of JAX, whose value may not be known yet.
        The error is a ValueError, too.
      ValueError: If it is less than `least`.
    """
    value = _scalar(name, value)
    what = what if least is None else f"{what} of at least {least}"
    # To Python a bool is an integer; here it is a mistake.
    if isinstance(value, bool | np.bool_) or not isinstance(value, numbers.Integral):
        raise WrongKindError(f"{name}={value!r}: must be {what}")
    if least is not None and value < least:
        raise ValueError(f"{name}={value}: must be {what}")
    return int(value)


def real(name: str, value: Any, what: str = "a number") -> float:
    """Returns `value` as a Python float; raises as `integer` does.

    NaN and infinities pass: the caller checks the range.
    """
    value = _scalar(name, value)
    if isinstance(value, bool | np.bool_) or not isinstance(value, numbers.Real):
        raise WrongKindError(f"{name}={value!r}: must be {what}")
    return float(value)


def _scalar(name: str, value: Any) -> Any:
    if isinstance(value, jax.Array):
        raise WrongKindError(
            f"{name}: is an array of JAX, must be a number of Python or NumPy, known before "
            "anything is traced. Under optax.inject_hyperparams name all numbers of a sparse "
            f"method but seed in static_args: static_args=({name.split('[')[0]!r}, ...)"
        )
    return value.item() if isinstance(value, np.ndarray) and not value.ndim else value
