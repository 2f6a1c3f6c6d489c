"""Predicts the links of the bipartite graph that a layer's mask is, from the graph alone.

The nodes are the inputs and the outputs of a layer, or under `Block` its groups of them; an active
weight, or block, is a link.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from rigl_optax import _axes
from rigl_optax._layout import Layout, SparseLeaf
from rigl_optax._ranking import _scores, _top_k
from rigl_optax._structures import Block
from rigl_optax._types import Arrays
from rigl_optax._wrapper._method import RewiringInputs
from rigl_optax._xla import _sharding

# float32 holds integers of so many bits, whose sums are then the same in any order.
_EXACT_BITS = 24
_SHIFT_BITS = 8  # behind the point, where the scale of a layer's scores is chosen


def ch2_l3n(links: jax.Array) -> jax.Array:
    r"""Scores where a bipartite graph may grow a link, by its paths of three links (CH2-L3n).

    With the links A between inputs and outputs, their degrees k, and the numbers of common
    neighbours $C = A^T A$ of two outputs and $D = A A^T$ of two inputs,

    $$
    s_{uv} = \sum_z A_{uz} [C_{zv} > 0] \frac{1 + C_{zv}}{k_z - C_{zv}}
           + \sum_z [D_{uz} > 0] \frac{1 + D_{uz}}{k_z - D_{uz}} A_{zv}
    $$

    Each z is a node on a path of three links from u to v. One of its links goes to u or v, C or D
    to other such nodes, and the rest elsewhere.

    Fractions are rounded down to multiples of a power of two, which follows from the layer's
    degrees and largest fraction so that no score exceeds $2^{24}$. They are exact integers then:
    the same in every program, and on any number of devices.

    Args:
      links: Bool [inputs, outputs].

    Returns:
      int32 [inputs, outputs], in [0, 2**24), on a scale of the layer's own; arbitrary where there
      is a link.
    """
    a = links.astype(jnp.float32)
    of_inputs, of_outputs = (jnp.sum(links, axis, dtype=jnp.int32) for axis in (1, 0))
    fractions = [
        _fractions(_product(a.T, a), of_outputs[:, None]),
        _fractions(_product(a, a.T), of_inputs[None, :]),
    ]
    bits = [
        _bits(jnp.max(degrees)) + _bits(jnp.max((n << _SHIFT_BITS) // d + 1))
        for degrees, (n, d) in zip((of_inputs, of_outputs), fractions, strict=True)
    ]
    # Both sums are below 2**(bits - _SHIFT_BITS), and are added.
    shift = _EXACT_BITS + _SHIFT_BITS - 1 - jnp.maximum(*bits)
    longest = jnp.maximum(*(_bits(jnp.max(n)) for n, _ in fractions))
    up, down = jnp.clip(shift, 0, 31 - longest), jnp.maximum(-shift, 0)
    through_outputs, through_inputs = (
        (((n << up) // d) >> down).astype(jnp.float32) for n, d in fractions
    )
    return _product(a, through_outputs) + _product(through_inputs, a)


def scores(inputs: RewiringInputs) -> Arrays:
    """Scores all positions by `ch2_l3n` of what is active.

    Args:
      inputs: Of the rewiring.

    Returns:
      int32 arrays laid out as `inputs.weights`, in [0, 2**24); -1 for padding.
    """
    return by_graph(inputs, ch2_l3n, inputs.masks)


def by_graph(
    inputs: RewiringInputs, function: Callable[[jax.Array], jax.Array], arrays: Arrays
) -> Arrays:
    """Applies a function of [inputs, outputs] to each layer.

    On several devices each has all of a layer: paths go through all of its nodes.

    Args:
      inputs: Of the rewiring.
      function: From an array to an int32 array of its shape.
      arrays: Laid out as the weights of the inputs.

    Returns:
      Arrays laid out as `arrays`; -1 for padding.
    """
    found = []
    pairs = zip(inputs.leaves, inputs.packing.unpack(arrays), strict=True)
    for leaf, x in pairs:

        def of_layer(x: jax.Array, leaf: SparseLeaf = leaf) -> jax.Array:
            return _from_graph(leaf, function(_to_graph(leaf, x)))

        whole = _sharding.whole(x)
        scored = jax.vmap(of_layer)(whole) if leaf.stacked else of_layer(whole)
        found.append(_sharding.like(scored, x))
    return inputs.packing.pack(found, -1)


def relative_importance(weights: jax.Array) -> jax.Array:
    r"""Scores weights by their shares of what their input and their output have.

    $$
    r_{ij} = \frac{|w_{ij}|}{\sum_j |w_{ij}|} + \frac{|w_{ij}|}{\sum_i |w_{ij}|}
    $$

    Its logarithm, from sums of integers, so that it is the same in every program: weights are
    rounded down to a fraction of the layer's largest for the sums: 2**-18 with up to 4,095 inputs
    and outputs, 2**-24 with up to 63.

    Args:
      weights: float32 [inputs, outputs], 0 where there is none.

    Returns:
      int32 [inputs, outputs], in units of 1 / 4,096 and 0 or above; 0 for a weight of 0.
    """
    scores = _top_k.magnitude_scores(weights)
    # Two sums of so many entries stay below 2**31.
    units = _scores.units_of_largest(scores, min(24, 30 - max(weights.shape).bit_length()))
    of_inputs, of_outputs = (
        jnp.maximum(jnp.sum(units, axis, dtype=jnp.int32, keepdims=True), 1) for axis in (1, 0)
    )
    # r = |w| (a + b) / (a b), of the two sums.
    log = _scores.log2_of_magnitude(scores) + _scores.log2(of_inputs + of_outputs)
    log = log - _scores.log2(of_inputs) - _scores.log2(of_outputs)
    return jnp.where(scores > 0, log + (2 * 31 << _scores.LOG_BITS), 0)


def check(layout: Layout) -> None:
    """Raises a ValueError if a layer is no graph of inputs and outputs."""
    for leaf in layout.sparse:
        if isinstance(leaf.structure, Block):
            continue  # of all taps of a window together
        if len(leaf.kernel) < 2:
            raise ValueError(
                f"{leaf.path!r} has shape {leaf.layer_shape}: links are predicted between inputs "
                "and outputs; keep it dense"
            )
        if math.prod(leaf.kernel[:-2]) > 1:
            raise ValueError(
                f"{leaf.path!r} is a convolution with a window of {leaf.kernel[:-2]}: links are "
                "predicted between inputs and outputs, and a window has several weights for each "
                "such link; give it a Block, whose groups have all of them, or keep it dense"
            )


def flops(layout: Layout) -> float:
    """Returns the FLOPs of scoring all layers once: four dense products of each mask."""
    total = 0
    for leaf in layout.sparse:
        inputs, outputs = _graph_shape(leaf)
        total += leaf.layers * 4 * inputs * outputs * (inputs + outputs)
    return float(total)


def _fractions(common: jax.Array, degrees: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns numerators and denominators, int32; 0 and 1 where a node is on no path."""
    others = degrees - common  # the link to u or v too, which stands for the 1 that is added
    is_on_path = (common > 0) & (others > 0)
    return jnp.where(is_on_path, common + 1, 0), jnp.where(is_on_path, others, 1)


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    """Multiplies matrices of integers below 2**24, and so are all sums; int32."""
    product = jnp.matmul(a, b, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
    return product.astype(jnp.int32)


def _bits(x: jax.Array) -> jax.Array:
    return 32 - lax.clz(x)


def _graph_shape(leaf: SparseLeaf) -> tuple[int, int]:
    if isinstance(leaf.structure, Block):
        return leaf.grid[-2], leaf.grid[-1]
    return leaf.kernel[-2], leaf.kernel[-1]


def _to_graph(leaf: SparseLeaf, x: jax.Array) -> jax.Array:
    """Brings an array of a layer's grid to [inputs, outputs]."""
    if leaf.structure.has_parts:
        x = leaf.structure.expand(x, leaf.kernel)
    elif not isinstance(leaf.structure, Block):
        x = _axes.to_kernel(x, leaf.axes)
    return x.reshape(_graph_shape(leaf))


def _from_graph(leaf: SparseLeaf, x: jax.Array) -> jax.Array:
    """Brings [inputs, outputs] back to the layer's grid."""
    if isinstance(leaf.structure, Block):
        return x
    x = x.reshape(leaf.kernel)
    if leaf.structure.has_parts:
        return leaf.structure.groups(x)
    return _axes.from_kernel(x, leaf.axes, leaf.layer_shape)
