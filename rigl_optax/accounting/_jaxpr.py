"""Walks a jaxpr, through every kind of call and loop, and adds up its FLOPs."""

import collections
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.extend import core, source_info_util

from rigl_optax.accounting import _primitives, _provenance
from rigl_optax.accounting._provenance import Value

Equation = Any


class Tally:
    """Sums of FLOPs.

    Attributes:
      leaves: FLOPs of products, by the index of the parameter leaf that takes part in them.
      unattributed: Other FLOPs of products, by (primitive, location, reason).
      elementwise: FLOPs of elementwise operations, one per element.
      notes: What the count had to assume, in order; the values are None.
    """

    def __init__(self) -> None:
        self.leaves: collections.Counter[int] = collections.Counter()
        self.unattributed: collections.Counter[tuple[str, str, str]] = collections.Counter()
        self.elementwise = 0
        self.notes: dict[str, None] = {}

    @property
    def products(self) -> int:
        """FLOPs of all products, attributed or not."""
        return self.leaves.total() + self.unattributed.total()

    def add(self, other: "Tally") -> None:
        """Adds another tally to this one."""
        self.leaves.update(other.leaves)
        self.unattributed.update(other.unattributed)
        self.elementwise += other.elementwise
        self.notes.update(other.notes)


class Walker:
    """Follows values through jaxprs.

    Args:
      names: Path of each parameter leaf.
      sizes: Number of elements of each parameter leaf.
    """

    def __init__(self, names: Sequence[str], sizes: Sequence[int]) -> None:
        self.names, self.sizes = names, sizes
        self.axis_sizes: dict[str, int] = {}

    def walk(self, jaxpr: Any, inputs: Sequence[Value], tally: Tally, times: int) -> list[Value]:
        """Adds the FLOPs of `times` runs of a jaxpr to `tally`.

        Args:
          jaxpr: Open or closed.
          inputs: Descriptions of its arguments.
          tally: Updated.
          times: Number of runs; 0 only propagates the descriptions.

        Returns:
          Descriptions of its outputs.
        """
        jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
        known: dict[Any, Value] = {}
        known.update(zip(jaxpr.invars, inputs, strict=True))
        known.update({v: Value() for v in jaxpr.constvars})

        def read(atom: Any) -> Value:
            return Value() if isinstance(atom, core.Literal) else known[atom]

        for equation in jaxpr.eqns:
            outputs = self._equation(equation, [read(v) for v in equation.invars], tally, times)
            known.update(zip(equation.outvars, outputs, strict=True))
        return [read(v) for v in jaxpr.outvars]

    def _equation(
        self, equation: Equation, values: list[Value], tally: Tally, times: int
    ) -> list[Value]:
        name, params = equation.primitive.name, equation.params
        if name == "scan":
            return self._scan(params, values, tally, times)
        if name == "while":
            return self._while(equation, values, tally, times)
        if name == "cond":
            return self._cond(equation, values, tally, times)
        if name == "shard_map":
            return self._shard_map(params, values, tally, times)
        # Any other primitive with one jaxpr of matching arity is a call: jit, remat, custom_jvp.
        inner = [p for p in params.values() if isinstance(p, core.Jaxpr | core.ClosedJaxpr)]
        if len(inner) == 1 and len(getattr(inner[0], "jaxpr", inner[0]).invars) == len(values):
            is_call = len(getattr(inner[0], "jaxpr", inner[0]).outvars) == len(equation.outvars)
            if is_call and name not in _primitives.REDUCTIONS | _primitives.WINDOWS:
                return self.walk(inner[0], values, tally, times)
        self._count(equation, values, tally, times)
        return [_provenance.propagate(equation, values, self.sizes)] * len(equation.outvars)

    def _count(self, equation: Equation, values: list[Value], tally: Tally, times: int) -> None:
        # Devices that hold different values each do work of their own.
        for axis in frozenset[str]().union(*(v.axes for v in values)):
            times *= self.axis_sizes[axis]
        products = _primitives.product_flops(equation)
        if products is not None:
            self._attribute(equation, values, tally, products * times)
            return
        elementwise = _primitives.elementwise_flops(equation)
        if elementwise is None:
            where = location(equation)
            tally.notes[f"{equation.primitive.name} at {where}: its cost is not known"] = None
        else:
            tally.elementwise += elementwise * times

    def _attribute(self, equation: Equation, values: list[Value], tally: Tally, flops: int) -> None:
        weights = [v for v in values if v.shares and not v.data] or [v for v in values if v.shares]
        remaining = flops
        if len(weights) == 1:
            for leaf, share in weights[0].shares:
                part = int(flops * share)
                tally.leaves[leaf] += part
                remaining -= part
        if remaining:
            reason = self._reason(values, weights)
            tally.unattributed[(equation.primitive.name, location(equation), reason)] += remaining

    def _reason(self, values: list[Value], weights: list[Value]) -> str:
        if len(weights) == 1:
            return "padded with a constant"
        leaves = frozenset[int]().union(*(v.leaves for v in values))
        if leaves:
            kind = "several parameters" if len(leaves) > 1 else "a parameter mixed with constants"
            return f"{kind}: " + ", ".join(self.names[i] for i in sorted(leaves))
        if any(not v.data for v in values):
            return "a constant, not a parameter"
        return "no parameter takes part"

    def _scan(
        self, params: Mapping[str, Any], values: list[Value], tally: Tally, times: int
    ) -> list[Value]:
        consts, carry, slices = _scan_operands(params, values)
        carry = self._fixed_point(params["jaxpr"], consts, carry, slices)
        return self.walk(params["jaxpr"], consts + carry + slices, tally, times * params["length"])

    def _fixed_point(
        self, body: Any, consts: list[Value], carry: list[Value], slices: list[Value]
    ) -> list[Value]:
        """Runs a loop body on descriptions until that of the carry holds for every iteration."""
        while True:
            after = self.walk(body, consts + carry + slices, Tally(), 0)[: len(carry)]
            joined = [_provenance.join(pair) for pair in zip(carry, after, strict=True)]
            if joined == carry:
                return carry
            carry = joined

    def _while(
        self, equation: Equation, values: list[Value], tally: Tally, times: int
    ) -> list[Value]:
        params = equation.params
        split = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
        tests, consts, carry = values[: split[0]], values[split[0] : split[1]], values[split[1] :]
        carry = self._fixed_point(params["body_jaxpr"], consts, carry, [])
        once = Tally()
        self.walk(params["cond_jaxpr"], tests + carry, once, times)
        self.walk(params["body_jaxpr"], consts + carry, once, times)
        if once.products or once.elementwise:
            once.notes[
                f"while at {location(equation)}: number of iterations not known; counted once, "
                f"{once.products} FLOPs"
            ] = None
        tally.add(once)
        return carry

    def _cond(
        self, equation: Equation, values: list[Value], tally: Tally, times: int
    ) -> list[Value]:
        index, operands = values[0], values[1:]
        tallies, outputs = [], []
        for branch in equation.params["branches"]:
            tallies.append(Tally())
            outputs.append(self.walk(branch, operands, tallies[-1], times))
        worst = max(tallies, key=lambda t: (t.products, t.elementwise))
        costs = [t.products for t in tallies]
        # Branches of `platform_dependent` compute the same thing; some just use no product for it.
        is_by_platform = equation.params.get("branches_platforms") is not None
        if min(costs) != max(costs) and not is_by_platform:
            worst.notes[
                f"cond at {location(equation)}: most expensive branch counted; they have {costs} "
                "FLOPs"
            ] = None
        tally.add(worst)
        joined = [_provenance.join(branch) for branch in zip(*outputs, strict=True)]
        return [v._replace(data=v.data or index.data) for v in joined]

    def _shard_map(
        self, params: Mapping[str, Any], values: list[Value], tally: Tally, times: int
    ) -> list[Value]:
        self.axis_sizes.update(params["mesh"].shape)
        inside = [
            v._replace(axes=v.axes | _spec_axes(spec))
            for v, spec in zip(values, params["in_specs"], strict=True)
        ]
        outside = frozenset[str]().union(*(v.axes for v in values))
        outputs = self.walk(params["jaxpr"], inside, tally, times)
        return [v._replace(axes=v.axes & outside) for v in outputs]


def _scan_operands(params: Mapping[str, Any], values: list[Value]) -> list[list[Value]]:
    """Splits operands of a scan into constants, carries and slices; newer JAX has `ft_in`."""
    if "ft_in" in params:
        return [list(group) for group in params["ft_in"].update(values).unpack()]
    fixed = params["num_consts"]
    last = fixed + params["num_carry"]
    return [values[:fixed], values[fixed:last], values[last:]]


def _spec_axes(spec: Any) -> frozenset[str]:
    """Returns the mesh axes that a `PartitionSpec` names."""
    names: set[str] = set()
    for entry in spec:
        names.update(entry if isinstance(entry, tuple) else [entry] if entry else [])
    return frozenset(names)


def location(equation: Equation) -> str:
    """Returns file name, line and function that made an equation, and its name scope."""
    source, scope = equation.source_info, str(equation.source_info.name_stack)
    where = source_info_util.summarize(source).replace("\\", "/").rsplit("/", 1)[-1]
    return f"{where} in {scope}" if scope else where


def leaf_size(leaf: Any) -> int:
    """Returns the number of elements of an array or `jax.ShapeDtypeStruct`."""
    return math.prod(leaf.shape)


def argument_value(leaf: Any) -> Value:
    """Describes an argument of the function: data, unless it holds bools (masks) or PRNG keys."""
    dtype = jax.dtypes.result_type(leaf) if not hasattr(leaf, "dtype") else leaf.dtype
    is_key = jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key)
    return Value(data=not (is_key or jax.dtypes.issubdtype(dtype, bool)))
