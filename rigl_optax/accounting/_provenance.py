"""Tracks which parameter a value inside a computation is a view of."""

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, NamedTuple

Equation = Any  # jax.extend.core.JaxprEqn

_MULTIPLICATIVE = frozenset({"mul", "div", "select_n"})
_INDEXED = frozenset({"gather", "dynamic_slice"})
_PRODUCTS = frozenset({"dot_general", "ragged_dot_general", "conv_general_dilated"})
_UNITES_DEVICES = frozenset(
    {"psum", "psum_invariant", "pmax", "pmin", "all_gather", "all_gather_invariant"}
)


class Value(NamedTuple):
    """Describes one value of a jaxpr.

    Attributes:
      shares: `(leaf, fraction of its elements)` of each parameter leaf that the value is a view
        of, through casts, reshapes, slices, masks, normalisation, ...; empty if of none.
      data: Whether it depends on an argument other than params (bools and keys aside).
      leaves: All parameter leaves it is computed from; empty if it depends on data.
      axes: Mesh axes, inside `shard_map`, along which devices hold different values.
    """

    shares: tuple[tuple[int, Fraction], ...] = ()
    data: bool = False
    leaves: frozenset[int] = frozenset()
    axes: frozenset[str] = frozenset()


def parameter(leaf: int) -> Value:
    """Describes a parameter leaf itself."""
    return Value(((leaf, Fraction(1)),), False, frozenset({leaf}))


def join(values: Sequence[Value]) -> Value:
    """Describes a value that may be any of several: outputs of branches, loop carries."""
    same = all(v.shares == values[0].shares for v in values)
    return _merged(values)._replace(shares=values[0].shares if same else ())


def propagate(equation: Equation, values: Sequence[Value], sizes: Sequence[int]) -> Value:
    """Describes the outputs of a primitive, given its operands.

    A value computed from one parameter (and constants) stays a view of it. One computed from
    several parameters is a view of none, except that a concatenation is divided by size, and that
    a product belongs to the factor that is as large as the result (`w * scale`). Where data take
    part, only a mask or rescaling of a whole weight stays a view.

    Args:
      equation: The equation.
      values: Descriptions of its operands.
      sizes: Number of elements of every parameter leaf.

    Returns:
      The description of all outputs.
    """
    name = equation.primitive.name
    merged = _merged(values)
    if name in _UNITES_DEVICES:
        merged = merged._replace(axes=merged.axes - axis_names(equation.params))
    elif name == "axis_index":
        merged = merged._replace(axes=merged.axes | axis_names(equation.params))
    views = [(i, v) for i, v in enumerate(values) if v.shares]
    if not views:
        return merged
    if name in _INDEXED:
        keeps_matrix = not any(v.data for v in values[1:]) or _is_matrix(_slice_shape(equation))
        return merged._replace(shares=values[0].shares if keeps_matrix else ())
    if name == "concatenate":
        return merged._replace(shares=() if merged.data else _concatenated(equation, values))
    if name in _PRODUCTS and merged.data:
        return merged
    if name in _MULTIPLICATIVE:
        out = math.prod(equation.outvars[0].aval.shape)
        views = [
            (i, v)
            for i, v in views
            if sum(sizes[leaf] for leaf, _ in v.shares) >= out
            and (not merged.data or _is_matrix(equation.invars[i].aval.shape))
        ]
    elif any((v.data or v.leaves) and not v.shares for v in values):
        return merged
    distinct = {v.shares for _, v in views}
    if len(distinct) != 1 or (len(views) > 1 and merged.data):
        return merged
    return merged._replace(shares=distinct.pop())


def axis_names(params: dict[str, Any]) -> frozenset[str]:
    """Returns the mesh axes that a collective names in its parameters."""
    axes = params.get("axes", params.get("axis_name", ()))
    return frozenset(a for a in (axes if isinstance(axes, tuple) else (axes,)) if a is not None)


def _merged(values: Sequence[Value]) -> Value:
    data = any(v.data for v in values)
    leaves = frozenset() if data else frozenset[int]().union(*(v.leaves for v in values))
    return Value((), data, leaves, frozenset[str]().union(*(v.axes for v in values)))


def _concatenated(equation: Equation, values: Sequence[Value]) -> tuple[tuple[int, Fraction], ...]:
    """Computes shares in proportion to the number of elements of each operand."""
    total = math.prod(equation.outvars[0].aval.shape)
    shares: dict[int, Fraction] = {}
    for var, value in zip(equation.invars, values, strict=True):
        for leaf, share in value.shares if total else ():
            part = share * Fraction(math.prod(var.aval.shape), total)
            shares[leaf] = shares.get(leaf, Fraction(0)) + part
    return tuple(sorted(shares.items()))


def _slice_shape(equation: Equation) -> tuple[int, ...]:
    return tuple(equation.params["slice_sizes"])


def _is_matrix(shape: Sequence[int]) -> bool:
    """Returns whether two or more dimensions exceed 1. A row looked up in a table has just one."""
    return sum(n > 1 for n in shape) >= 2
