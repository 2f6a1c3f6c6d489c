"""Counts the connections of units, and the units that have lost all of them.

An argument `axes` says which axes of a kernel are inputs and outputs, as for a distribution;
windows are summed over.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rigl_optax import _axes, _distributions, _paths
from rigl_optax._axes import KernelAxes
from rigl_optax._types import PyTree
from rigl_optax._xla import _sharding


class DeadUnits(NamedTuple):
    """Numbers of units without connections in one layer.

    Attributes:
      inputs: int32 scalar: inputs that no output reads. In the first layer these are features that
        the network ignores, in a later one hidden units without effect.
      outputs: int32 scalar: output units without inputs; they are constant.
    """

    inputs: jax.Array
    outputs: jax.Array


@functools.partial(jax.jit, static_argnames="axes")
def fan_in(mask: jax.Array, axes: KernelAxes | None = None) -> jax.Array:
    """Counts the active weights into each output unit.

    Args:
      mask: Bool array (..., inputs, outputs), or with other axes if `axes` is given.
      axes: The axes of inputs and outputs, if they are not the last two.

    Returns:
      int32 array (outputs,), or of all axes that `axes` names as outputs.
    """
    return _summed(mask, _axes.or_last(axes, mask.ndim).outputs)


@functools.partial(jax.jit, static_argnames="axes")
def fan_out(mask: jax.Array, axes: KernelAxes | None = None) -> jax.Array:
    """Counts the active weights out of each input unit, such as a pixel.

    Args:
      mask: As in `fan_in`.
      axes: As in `fan_in`.

    Returns:
      int32 array (inputs,), or of all axes that `axes` names as inputs.
    """
    return _summed(mask, _axes.or_last(axes, mask.ndim).inputs)


@jax.jit
def effective_units(into: jax.Array, number: jax.typing.ArrayLike = 1) -> jax.Array:
    r"""Counts the units among which the active weights of a layer are spread.

    Use it to see whether growth has gathered the weights of a layer at a few of its units, which no
    count of dead units shows. It is the participation ratio of the fan-ins $n_i$,

    $$
    \frac{(\sum_i n_i)^2}{\sum_i n_i^2},
    $$

    all units if they have equally many inputs, and 1 if one of them has all.

    Args:
      into: Number of active weights into each unit, as from `fan_in`.
      number: How many units each entry of `into` stands for: a scalar, or of its shape.

    Returns:
      float32 scalar; 0 where nothing is active.

    Examples:
      >>> float(effective_units(jnp.array([5, 5, 5, 5])))
      4.0
      >>> float(effective_units(jnp.array([20, 0, 0, 0])))
      1.0
    """
    into = _sharding.whole(into)
    # Divided by the largest: float32 holds squares of any counts.
    part = into.astype(jnp.float32) / jnp.maximum(jnp.max(into), 1).astype(jnp.float32)
    squares = jnp.sum(number * part**2)
    return jnp.where(squares > 0, jnp.sum(number * part) ** 2 / jnp.maximum(squares, 1), 0.0)


@functools.partial(jax.jit, static_argnames="heads")
def dead_heads(values: jax.Array, out: jax.Array, *, heads: int) -> jax.Array:
    """Finds the heads of attention whose output does not depend on the input.

    Use it to see whether sparsity cuts heads off. A head is dead if none of its features has both
    an active weight into its value and one out of it: whatever it attends to, nothing passes. A
    head without queries or keys is not: it still passes on an average (`averaging_heads`).

    Args:
      values: Number of active weights into each feature of the values, head by head: (heads *
        head_dim,), or (heads, head_dim), as from `fan_in`.
      out: Number of active weights out of each feature, as from `fan_out`; same shape.
      heads: Number of heads.

    Returns:
      Bool array (heads,).

    Raises:
      ValueError: If `heads` does not divide the features.

    Examples:
      >>> dead_heads(jnp.array([2, 0, 1, 1]), jnp.array([0, 3, 1, 0]), heads=2).tolist()
      [True, False]
    """
    return ~jnp.any(_by_head(values, heads) & _by_head(out, heads), axis=1)


@functools.partial(jax.jit, static_argnames=("heads", "rotary"))
def averaging_heads(
    queries: jax.Array, keys: jax.Array, *, heads: int, rotary: bool = False
) -> jax.Array:
    """Finds the heads of attention whose scores are the same for all positions, whatever the input.

    Such a head takes the mean of the values. A score is a sum of products of a query's feature and
    the key's, so it is always 0 if no feature has active weights into both. That holds without
    biases: one of the queries makes scores depend on the keys alone.

    Args:
      queries: Number of active weights into each feature of the queries, as `values` in
        `dead_heads`.
      keys: The same for the keys.
      heads: Number of heads.
      rotary: Whether features are rotated in pairs, i and i + head_dim / 2: then a score has
        products within the pair, too.

    Returns:
      Bool array (heads,).

    Raises:
      ValueError: If `heads` does not divide the features.

    Examples:
      >>> queries, keys = jnp.array([2, 0, 1, 1]), jnp.array([0, 3, 1, 0])
      >>> averaging_heads(queries, keys, heads=2).tolist()
      [True, False]
      >>> averaging_heads(queries, keys, heads=2, rotary=True).tolist()
      [False, False]
    """
    q, k = _by_head(queries, heads), _by_head(keys, heads)
    if rotary:
        q, k = (jnp.any(x.reshape(heads, 2, -1), axis=1) for x in (q, k))
    return ~jnp.any(q & k, axis=1)


@jax.jit
def dead_hidden_units(into: Sequence[jax.Array], out: jax.Array) -> jax.Array:
    """Finds the hidden units of an MLP that have no inputs or are not read.

    Use it where a unit is read through one kernel and written through another, or through several,
    as with gates: a gated unit without an input to its gate is 0, as one without inputs.

    Args:
      into: Number of active weights into each unit, as from `fan_in`: a vector for each kernel,
        whose results are multiplied.
      out: Number of active weights out of each unit, as from `fan_out`.

    Returns:
      Bool array (units,).

    Examples:
      >>> dead_hidden_units([jnp.array([0, 2, 1])], jnp.array([1, 1, 0])).tolist()
      [True, False, True]
    """
    each = [_sharding.whole(x) == 0 for x in (*into, out)]
    return functools.reduce(jnp.logical_or, each)


def dead_units(
    masks: PyTree, *, axes: _axes.Axes = _axes.default_axes, stacked: Sequence[str] = ()
) -> dict[str, DeadUnits]:
    """Counts the dead inputs and outputs of every leaf with two dimensions or more.

    Use it to see whether sparsity cuts units off: a hidden unit is dead if it is a dead output of
    its layer or a dead input of the next.

    Args:
      masks: Tree of bool arrays, as `get_masks` returns it.
      axes: As in `uniform`: which axes are inputs.
      stacked: As in `uniform`; the units of all layers of a stack are counted.

    Returns:
      `{path: DeadUnits}`, without leaves that have fewer dimensions.

    Raises:
      ValueError: If a pattern of `stacked` matches no leaf.

    Examples:
      >>> mask = jnp.array([[True, False], [False, False], [True, False]])
      >>> dead = dead_units({"kernel": mask})["kernel"]
      >>> int(dead.inputs), int(dead.outputs)
      (1, 1)
    """
    stacks = _distributions.stacked_paths(masks, stacked)
    layouts = []
    for path, mask in _paths.flatten_with_paths(masks):
        if np.ndim(mask) - (path in stacks) >= 2:
            layouts.append((path, path in stacks, _axes.of_leaf(axes, path, mask, path in stacks)))
    # The axes are static, so they are found before tracing, from shapes.
    return _dead_units(masks, tuple(layouts))


@functools.partial(jax.jit, static_argnums=1)
def _dead_units(
    masks: PyTree, layouts: Sequence[tuple[str, bool, KernelAxes]]
) -> dict[str, DeadUnits]:
    named = dict(_paths.flatten_with_paths(masks))

    def dead(path: str, is_stack: bool, axes: tuple[int, ...]) -> jax.Array:
        active = _summed(named[path], (0, *axes) if is_stack else axes)
        return jnp.sum(active == 0, dtype=jnp.int32)

    return {
        path: DeadUnits(dead(path, is_stack, axes.inputs), dead(path, is_stack, axes.outputs))
        for path, is_stack, axes in layouts
    }


def _by_head(counts: jax.Array, heads: int) -> jax.Array:
    """Tells of each feature of each head whether it has connections: bool (heads, head_dim)."""
    if heads < 1 or counts.size % heads:
        raise ValueError(f"heads={heads}: must divide the {counts.size} features of the heads")
    return _sharding.whole(counts).reshape(heads, -1) > 0


def _summed(mask: jax.Array, but: tuple[int, ...]) -> jax.Array:
    """Sums over all axes but these, which may be negative and come out in the given order."""
    kept = [a % mask.ndim for a in but]
    summed = [a for a in range(mask.ndim) if a not in kept]
    sums = jnp.sum(mask, axis=tuple(summed), dtype=jnp.int32)
    order = tuple(sorted(kept).index(a) for a in kept)
    return sums if order == tuple(range(len(order))) else sums.transpose(order)
