"""Counts FLOPs of one run of any JAX function, per parameter."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from rigl_optax import _paths
from rigl_optax._types import PyTree
from rigl_optax.accounting import _jaxpr, _provenance


class Unattributed(NamedTuple):
    """FLOPs of products that belong to no single parameter.

    Attributes:
      primitive: Name of the JAX primitive, such as `dot_general`.
      flops: Multiplies plus adds.
      where: File, line, function and scope of the operation.
      why: The kind of its operands: data only (attention scores), a constant, several parameters
        at once.
    """

    primitive: str
    flops: int
    where: str
    why: str


class Cost(NamedTuple):
    """FLOPs (multiplies plus adds) of one run of a function.

    Attributes:
      by_parameter: `{path: FLOPs}` of the products each parameter leaf takes part in, in tree
        order; 0 for biases and scales, which only meet elementwise operations.
      unattributed: Products that belong to no single parameter. A sparse network has the same.
      elementwise: Operations of activations, normalisation, pooling, ..., one per element. They
        are the same in a sparse network, and by the paper's convention in no total.
      notes: Assumptions of the count: iterations of a `while`, the branch of a `cond`, primitives
        whose cost is not known.
    """

    by_parameter: dict[str, int]
    unattributed: tuple[Unattributed, ...]
    elementwise: int
    notes: tuple[str, ...]

    @property
    def total(self) -> int:
        """FLOPs of all products, attributed or not: the dense cost `f_D`."""
        return sum(self.by_parameter.values()) + sum(u.flops for u in self.unattributed)


def count_flops(fn: Callable[..., Any], params: PyTree, *args: PyTree) -> Cost:
    """Counts multiplies plus adds of `fn(params, *args)`, read from its jaxpr.

    Nothing is computed: params and arguments may be `jax.ShapeDtypeStruct`s. Every product
    (`dot_general`, convolution) is attributed to the parameter it multiplies by, which is followed
    through casts, reshapes, transposes, broadcasts, slices, gathers, masks, concatenation and any
    function of that one parameter. A parameter used twice counts twice. A sum of `n` products
    costs `2 n`.

    - Convolutions count with their real output sizes; windows count in full where they overlap
      padding; the holes of a transposed convolution's input do not count.
    - Scans count once per iteration, `while` loops once in all (with a note), `cond` by its most
      expensive branch (with a note).
    - `shard_map` counts the work of all devices together; work that all devices along an axis
      repeat counts once.
    - Rematerialisation and custom derivative rules cost nothing in a forward pass. Code is counted
      as traced, even if the compiler later removes it as dead or duplicate.

    Args:
      fn: `fn(params, *args)`, any function that `jax.jit` accepts. Bind arguments that are not
        arrays, as with `functools.partial`.
      params: Parameters, arrays or shapes.
      *args: Further arguments, arrays or shapes; a batch of one example gives FLOPs per example.

    Returns:
      FLOPs per parameter, and the rest.

    Raises:
      ValueError: If two parameter leaves have the same path.

    Examples:
      >>> import jax.numpy as jnp
      >>> params = {"kernel": jnp.ones((784, 300)), "bias": jnp.ones(300)}
      >>> layer = lambda params, x: jax.nn.relu(x @ params["kernel"] + params["bias"])
      >>> count_flops(layer, params, jax.ShapeDtypeStruct((1, 784), jnp.float32)).by_parameter
      {'bias': 0, 'kernel': 470400}

    Source: FLOPs as multiplies plus adds are the paper's (appendix H).
    """
    named = _paths.flatten_with_paths(params)
    names = [path for path, _ in named]
    closed = jax.make_jaxpr(fn)(params, *args)
    inputs = [
        _provenance.parameter(i)
        if jax.dtypes.issubdtype(leaf.dtype, jax.numpy.number)
        else _provenance.Value()  # a mask that is kept among the parameters
        for i, (_, leaf) in enumerate(named)
    ] + [_jaxpr.argument_value(leaf) for leaf in jax.tree.leaves(args)]
    tally = _jaxpr.Tally()
    walker = _jaxpr.Walker(names, [_jaxpr.leaf_size(leaf) for _, leaf in named])
    walker.walk(closed.jaxpr, inputs, tally, times=1)
    return Cost(
        by_parameter={name: tally.leaves[i] for i, name in enumerate(names)},
        unattributed=tuple(
            Unattributed(primitive, flops, where, why)
            for (primitive, where, why), flops in tally.unattributed.items()
        ),
        elementwise=tally.elementwise,
        notes=tuple(tally.notes),
    )
