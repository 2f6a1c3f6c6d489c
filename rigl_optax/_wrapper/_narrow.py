"""Optimizers in float16: where nothing has moved, nothing moves.

Adam divides by the root of an average plus 1e-8, which float16 rounds to 0. The gradient of an
inactive weight is 0 at every step, and so is its average: 0 / 0, which a norm or a clip inside the
optimizer spreads over all weights. No optimizer means that. Here such quotients are 0, as they are
in wider floats.
"""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from rigl_optax._types import PyTree
from rigl_optax._xla import _blend


def is_narrow(leaves: Iterable[Any]) -> bool:
    """Tells whether any of these arrays has floats with a smaller range than float32's."""
    dtypes = {jnp.result_type(leaf) for leaf in leaves}
    floats = [dtype for dtype in dtypes if jnp.issubdtype(dtype, jnp.floating)]
    return any(jnp.finfo(dtype).minexp > -100 for dtype in floats)


def with_zero_quotients(function: Callable[..., PyTree], *args: PyTree) -> PyTree:
    """Calls `function(*args)`, with 0 / 0 as 0, and 0 times infinity between arrays."""
    closed, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
    leaves = jax.core.eval_jaxpr(_mended(closed.jaxpr), closed.consts, *jax.tree.leaves(args))
    return jax.tree.unflatten(jax.tree.structure(shapes), leaves)


def _mended(jaxpr: Any) -> Any:
    return jaxpr.replace(eqns=[_mended_equation(equation) for equation in jaxpr.eqns])


def _mended_equation(equation: Any) -> Any:
    name = equation.primitive.name
    if "pallas" in name:  # a kernel, which has no calls
        return equation
    if name in _SAFE and jnp.issubdtype(equation.outvars[0].aval.dtype, jnp.floating):
        avals = [variable.aval for variable in equation.invars]
        # Scalars are rates and norms: infinity there is no quotient of nothing.
        if name == "div" or all(aval.ndim for aval in avals):
            with equation.ctx.manager:  # its mesh: within a program it may be another
                call = jax.make_jaxpr(jax.jit(_SAFE[name]))(*avals).jaxpr.eqns[0]
            return call.replace(invars=equation.invars, outvars=equation.outvars)
    params = {key: _mended_value(value) for key, value in equation.params.items()}
    return equation.replace(params=params)


def _mended_value(value: Any) -> Any:
    """Mends the programs in a parameter of an equation."""
    from jax.extend import core  # slow to import: it brings Pallas

    if isinstance(value, core.ClosedJaxpr):
        return value.replace(jaxpr=_mended(value.jaxpr))
    if isinstance(value, core.Jaxpr):
        return _mended(value)
    if type(value) in (tuple, list):
        return type(value)(_mended_value(each) for each in value)
    return value


def _quotient(x: jax.Array, y: jax.Array) -> jax.Array:
    quotient = x / y
    return _blend.masked(~((x == 0) & (y == 0)), quotient)


def _product(x: jax.Array, y: jax.Array) -> jax.Array:
    is_nothing = ((x == 0) & jnp.isinf(y)) | (jnp.isinf(x) & (y == 0))
    product = x * y
    return _blend.masked(~is_nothing, product)


_SAFE = {"div": _quotient, "mul": _product}
