"""Predicted costs against what the traced programs do."""

import jax
import jax.numpy as jnp
import pytest

from rigl_optax import Block
from rigl_optax.condensed import product_costs, random_topology
from rigl_optax.condensed.blocks import _pallas_tpu, _product, _ragged

TOKENS, SHAPE, BLOCK = 24, (64, 96), Block(8, 16)
TOPOLOGY = random_topology(SHAPE, 0.75, BLOCK)
VALUES = jax.ShapeDtypeStruct(TOPOLOGY.values_shape, "float32")
X, DY = (jax.ShapeDtypeStruct((TOKENS, n), "float32") for n in SHAPE)


def equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "jaxpr")
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def gathered_and_flops(function, *args):
    """Bytes of gathered activations, and operations of all products but of masked copies."""
    gathered = flops = 0
    for equation in equations(jax.make_jaxpr(function)(*args).jaxpr):
        (out, *_), name = (v.aval for v in equation.outvars), equation.primitive.name
        if name == "gather" and out.dtype == jnp.float32 and TOKENS in out.shape:
            gathered += out.size * out.dtype.itemsize
        if name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            flops += 2 * out.size * equation.invars[0].aval.shape[contracted[0]]
        if name == "ragged_dot_general":
            a, b = (v.aval for v in equation.invars[:2])
            flops += 2 * a.size * b.shape[-1]
    return gathered, flops


def costs(product):
    return product_costs(product, TOKENS, SHAPE, BLOCK, TOPOLOGY.density, itemsize=4)


def test_operations_and_copies_of_the_batched_product():
    wanted, (rows, cols) = costs("batched"), (TOPOLOGY.rows, TOPOLOGY.cols)
    parts = 4 * TOKENS * TOPOLOGY.number  # bytes for one feature of each block

    def forward(values, x):
        return _product._gathered(1, SHAPE[1], values, rows, cols, x)

    def values(x, dy):
        return _product._values_gathered((8, 16), rows, cols, x, dy)

    gathered, flops = gathered_and_flops(forward, VALUES, X)
    assert (gathered + parts * 16, flops) == (wanted["forward"].gathered, wanted["forward"].flops)
    gathered, flops = gathered_and_flops(values, X, DY)
    assert (gathered, flops) == (wanted["values"].gathered, wanted["values"].flops)
    assert wanted["inputs"].gathered == wanted["forward"].gathered  # parts and copies swap


def test_operations_and_copies_of_the_ragged_product():
    wanted, (rows, cols) = costs("ragged"), (TOPOLOGY.rows, TOPOLOGY.cols)

    def forward(values, x):
        return _ragged.forward(values, rows, cols, x, SHAPE[1])

    def backward(values, x, dy):
        return _ragged.backward(values, rows, cols, x, dy)

    found = gathered_and_flops(forward, VALUES, X)
    assert found == (wanted["forward"].gathered, wanted["forward"].flops)
    both = [wanted[name] for name in ("inputs", "values")]
    gathered, flops = gathered_and_flops(backward, VALUES, X, DY)
    assert gathered == sum(c.gathered for c in both) and flops == sum(c.flops for c in both)


def test_kernels_copy_and_gather_nothing_where_blocks_are_tiles():
    shape, tokens = (256, 512), 1024
    topology = random_topology(shape, 0.5, Block(128, 128))
    found = product_costs("pallas", tokens, shape, Block(128, 128), topology.density)
    tiles = tokens // _pallas_tpu.rows_at_once(tokens, 256 * 2)
    weights, x, y = (2 * n for n in (topology.number * 128**2, tokens * 256, tokens * 512))
    flops = 2 * tokens * topology.number * 128**2
    assert found["forward"] == (flops, x + tiles * weights + 3 * y, 0)
    narrow = product_costs("pallas", tokens, shape, Block(64, 128), topology.density)
    assert narrow["forward"].bytes == found["forward"].bytes + 2 * x
    assert {c.flops for c in narrow.values()} == {flops}


def test_a_time_is_that_of_the_slower_of_computing_and_moving():
    cost = product_costs("dense", 2, (4, 8), Block(4, 4), 1.0)["forward"]
    assert cost == (2 * 2 * 4 * 8, 2 * (2 * 4 + 2 * 8 + 4 * 8), 0)
    assert cost.seconds(128.0, 1.0) == 112.0 and cost.seconds(1.0, 112.0) == 128.0
    with pytest.raises(ValueError, match="product 'sparse': must be dense or one of batched"):
        product_costs("sparse", 2, (4, 8), Block(4, 4), 1.0)
