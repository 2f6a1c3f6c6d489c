"""Kernels for GPUs: interpreted where JAX can, lowered for CUDA, and what they refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from rigl_optax import Block
from rigl_optax.condensed import BlockSparse, BlockTopology, product_costs, products
from rigl_optax.condensed.blocks import _mosaic_gpu

CUDA = {("cuda", None, None): "mosaic_gpu"}
# Block, kernel, batch, stored blocks: outputs or inputs without blocks, uneven counts, edges.
CASES = {
    "empty": ((64, 64), (192, 128), 70, [(0, 0), (2, 0)]),
    "edges": ((128, 64), (200, 130), 70, [(0, 0), (1, 0), (1, 1), (0, 2)]),
    "wide": ((64, 256), (128, 512), 10, [(1, 0), (0, 0)]),
    "one block": ((256, 128), (256, 128), 130, [(0, 0)]),
    "odd": ((192, 192), (192, 384), 65, [(0, 1)]),
}


def topology_of(name):
    block, shape, batch, places = CASES[name]
    rows, cols = np.array(sorted(places, key=lambda p: (p[1], p[0])), np.int32).T
    block = Block(*block, pad=True)
    return BlockTopology(jnp.asarray(rows), jnp.asarray(cols), shape, block), batch


def arrays(name, dtype="bfloat16"):
    topology, batch = topology_of(name)
    rng, (inputs, outputs) = np.random.default_rng(0), topology.shape
    shapes = topology.values_shape, (batch, inputs), (batch, outputs)
    values, x, dy = (jnp.asarray(rng.standard_normal(s), dtype) for s in shapes)
    return topology, topology.clear_padding(values), x, dy


@pytest.mark.skipif(not hasattr(plgpu, "InterpretGPUParams"), reason="this JAX interprets none")
@pytest.mark.parametrize("name", CASES)
def test_interpreted_they_agree_with_numpy(name):
    topology, values, x, dy = arrays(name)
    rows, cols, outputs = topology.rows, topology.cols, topology.shape[1]
    y = _mosaic_gpu.forward(values, rows, cols, x, outputs, interpret=True)
    dx, dvalues = _mosaic_gpu.backward(values, rows, cols, x, dy, interpret=True)
    w = np.asarray(topology.bind(values).dense(), np.float32)
    x, dy = np.asarray(x, np.float32), np.asarray(dy, np.float32)
    (r, c), padded = values.shape[1:], np.zeros((1024, 1024), np.float32)
    padded[: w.shape[0], : w.shape[1]] = x.T @ dy
    blocks = [
        padded[i * r : (i + 1) * r, o * c : (o + 1) * c] for i, o in zip(rows, cols, strict=True)
    ]
    assert y.dtype == dx.dtype == dvalues.dtype == jnp.float32
    for got, wanted in ((y, x @ w), (dx, dy @ w.T)):  # rounded once, to bfloat16
        np.testing.assert_allclose(got, wanted, rtol=2**-8, atol=1e-4)
    np.testing.assert_allclose(dvalues, np.stack(blocks), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "dtype"), [("edges", "bfloat16"), ("wide", "float16")])
def test_products_and_gradients_lower_for_cuda(name, dtype):
    topology, values, x, dy = arrays(name, dtype)

    def whole(values, x, dy):
        y, pull = jax.vjp(lambda v, x: x @ BlockSparse(v, topology), values, x)
        return y, pull(dy)

    with products(CUDA):
        program = jax.export.export(jax.jit(whole), platforms=["cuda"])(values, x, dy)
    assert program.mlir_module().count("stablehlo.custom_call @mosaic_gpu") == 3


def test_what_they_cannot_do_is_refused():
    topology, values, x, _ = arrays("one block")

    def lowered(values, x, block=topology):
        jax.eval_shape(lambda v, x: x @ BlockSparse(v, block), values, x)

    with products(CUDA):
        with pytest.raises(ValueError, match="float32; must be all bfloat16 or all float16"):
            lowered(values.astype(jnp.float32), x.astype(jnp.float32))
        small = BlockTopology(topology.rows, topology.cols, (32, 64), Block(32, 64))
        with pytest.raises(ValueError, match="blocks of 32x64; sides must be multiples of 64"):
            lowered(values[:, :32, :64], x[:, :32], small)


def test_they_read_activations_again_for_each_block():
    costs = product_costs("mosaic_gpu", 1024, (256, 512), Block(128, 128), 0.5)
    n, each = 4, 128 * 128  # stored blocks, and the numbers of each
    read = 2 * (1024 * n * 128 + 8 * n * each)
    assert costs["forward"] == (2 * 1024 * n * each, read + 2 * 1024 * 512, 0)
    assert costs["inputs"] == (2 * 1024 * n * each, read + 2 * 1024 * 256 + 4 * n * each, 0)
    assert costs["values"] == (2 * 1024 * n * each, 2 * 1024 * n * 256 + 4 * n * each, 0)
