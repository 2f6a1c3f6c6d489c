"""Products and convolutions of stored blocks against the dense kernel they stand for."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rigl_optax import NM, Block
from rigl_optax.condensed import BlockSparse, BlockTopology, convolve, matmul, random_topology
from rigl_optax.condensed.blocks import _convolution, _features_first, _product

DENSE = {
    "even": ((12, 9), Block(4, 3)),
    "padded": ((11, 8), Block(4, 3, pool_by="l2", pad=True)),
    "max": ((6, 10), Block(2, 5, pool_by="max")),
}
CONV = {
    "strided": ((3, 3, 6, 8), (2, 2), "SAME"),
    "valid": ((3, 2, 6, 8), (1, 2), "VALID"),
    "1x1": ((1, 1, 6, 8), (1, 1), "SAME"),
    "1x1 strided": ((1, 1, 6, 8), (2, 2), "VALID"),
    "pairs": ((2, 2, 6, 8), (1, 1), ((1, 0), (0, 2))),
    "padded blocks": ((3, 3, 5, 7), (1, 1), "SAME"),
}


def array(seed, shape, dtype=np.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def kernel_of(shape, block, sparsity=0.5, dtype=np.float32, seed=0):
    topology = random_topology(shape, sparsity, block, seed=seed)
    values = array(seed, topology.values_shape, dtype)
    # Beyond the edges of a padded layer there is nothing.
    mask = condensed_values(topology, np.ones(shape, np.float32)).astype(dtype)
    return BlockSparse(values * mask, topology, jnp.zeros(topology.grid))


def condensed_values(topology, dense):
    """The stored blocks of a dense array, one after the other."""
    block, values, dense = topology.block, [], np.asarray(dense)
    for row, col in zip(*map(np.asarray, (topology.rows, topology.cols)), strict=True):
        part = dense[
            ...,
            row * block.rows : (row + 1) * block.rows,
            col * block.cols : (col + 1) * block.cols,
        ]
        missing = block.rows - part.shape[-2], block.cols - part.shape[-1]
        pads = [(0, 0)] * (part.ndim - 2) + [(0, missing[0]), (0, missing[1])]
        values.append(np.pad(np.asarray(part), pads))
    return jnp.asarray(np.stack(values))


def close(got, wanted, rtol=1e-4, atol=1e-4):
    np.testing.assert_allclose(
        np.asarray(got, np.float64), np.asarray(wanted, np.float64), rtol=rtol, atol=atol
    )


def check_against_dense(apply, apply_dense, kernel, x, tolerance=1e-4):
    """Value, gradients and scores of `sum(apply(x, kernel) * c)`."""
    topology = kernel.topology
    dense = kernel.dense()
    y = jax.jit(apply_dense)(x, dense)
    c = array(7, y.shape, y.dtype)

    def loss(values, probe, x):
        out = apply(x, BlockSparse(values, topology, probe))
        return jnp.sum((out * c).astype(jnp.float32)), out

    (_, got), (dvalues, scores, dx) = jax.jit(
        jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)
    )(kernel.values, kernel.probe, x)
    ddense, dx_dense = jax.jit(
        jax.grad(lambda w, x: jnp.sum((apply_dense(x, w) * c).astype(jnp.float32)), (0, 1))
    )(dense, x)
    close_ = functools.partial(close, rtol=tolerance, atol=tolerance)
    assert got.dtype == y.dtype and dvalues.dtype == kernel.values.dtype
    close_(got, y)
    close_(dx, dx_dense)
    close_(dvalues, condensed_values(topology, ddense))
    close_(scores, topology.block.pool(ddense))


def matmul_dense(x, w):
    return x @ w


@pytest.mark.parametrize("name", DENSE)
def test_product_and_gradients(name):
    shape, block = DENSE[name]
    kernel = kernel_of(shape, block)
    check_against_dense(lambda x, k: x @ k, matmul_dense, kernel, array(1, (5, shape[0])))


@pytest.mark.parametrize("gathered", [0, _product.GATHERED])
@pytest.mark.parametrize("name", DENSE)
def test_loops_and_more_rows_than_a_tile(name, gathered, monkeypatch):
    """The paths of small and large layers, with features last and first."""
    monkeypatch.setattr(_product, "GATHERED", gathered)
    monkeypatch.setattr(_product, "ROWS", 8)
    monkeypatch.setattr(_features_first, "TILE", 8)
    shape, block = DENSE[name]
    kernel = kernel_of(shape, block)
    check_against_dense(matmul, matmul_dense, kernel, array(1, (2, 11, shape[0])), 1e-3)
    first = functools.partial(matmul, features_first=True)
    check_against_dense(first, lambda x, w: w.T @ x, kernel, array(1, (shape[0], 22)), 1e-3)


def test_bfloat16_adds_up_in_float32():
    shape, block = DENSE["even"]
    kernel = kernel_of(shape, block, dtype=jnp.bfloat16)
    x = array(1, (5, shape[0]), jnp.bfloat16)
    check_against_dense(lambda x, k: x @ k, matmul_dense, kernel, x, 3e-2)


@pytest.mark.parametrize("name", CONV)
def test_convolutions_and_gradients(name):
    shape, strides, padding = CONV[name]
    kernel = kernel_of(shape, Block(3, 2, pad=name == "padded blocks"))

    def dense(x, w):
        return jax.lax.conv_general_dilated(
            x, w, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    check_against_dense(
        functools.partial(convolve, strides=strides, padding=padding),
        dense,
        kernel,
        array(1, (2, 5, 6, shape[2])),
    )


def test_kernel_gradients_some_rows_of_images_at_a_time(monkeypatch):
    x = array(1, (2, 6, 5, 6))
    monkeypatch.setattr(_convolution, "ROWS", 2 * (2 * 5 * 3 * x.dtype.itemsize))  # of six
    kernel = kernel_of((3, 3, 6, 4), Block(3, 2))

    def dense(x, w):
        layout = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=layout)

    text = jax.jit(jax.grad(lambda v: convolve(x, BlockSparse(v, kernel.topology)).sum())).lower(
        kernel.values
    )
    assert "tensor<20x3xf32>" in text.as_text()
    check_against_dense(convolve, dense, kernel, x)


@pytest.fixture
def taken(monkeypatch):
    """The way that accelerators take, on the CPU; how often it was taken."""
    calls = []

    def platform_dependent(*args, cpu, default):
        calls.append(default)
        return default(*args)

    monkeypatch.setattr(jax.lax, "platform_dependent", platform_dependent)
    return calls


def test_what_accelerators_do_is_the_same(taken):
    shape, block = DENSE["padded"]
    check_against_dense(matmul, matmul_dense, kernel_of(shape, block), array(1, (5, shape[0])))
    assert len(taken) == 3
    kernel = kernel_of((3, 3, 6, 8), Block(3, 2))

    def dense(x, w):
        layout = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, w, (2, 2), "SAME", dimension_numbers=layout)

    check_against_dense(
        functools.partial(convolve, strides=(2, 2)), dense, kernel, array(1, (2, 4, 4, 6))
    )
    assert len(taken) == 6


def test_vmap_and_checkpoint():
    shape, block = DENSE["even"]
    kernel, x = kernel_of(shape, block), array(1, (3, 4, shape[0]))
    dense = kernel.dense()
    close(jax.jit(jax.vmap(lambda x: x @ kernel))(x), x @ dense)
    many = array(2, (3, *kernel.values.shape))
    each = lambda v, x: x @ BlockSparse(v, kernel.topology)
    got = jax.jit(jax.vmap(each))(many, x)
    for i in range(3):
        close(got[i], x[i] @ jax.jit(BlockSparse.dense)(BlockSparse(many[i], kernel.topology)))
    loss = lambda v: jnp.sum((x @ BlockSparse(v, kernel.topology)) ** 2)
    gradient = jax.jit(jax.grad(loss))(kernel.values)
    close(jax.jit(jax.grad(jax.checkpoint(loss)))(kernel.values), gradient)
    per_example = jax.vmap(jax.grad(lambda v, x: jnp.sum(each(v, x) ** 2)), (None, 0))
    close(jax.jit(per_example)(kernel.values, x).sum(0), gradient)


def test_nobody_pays_for_scores_without_asking():
    """Without a gradient with respect to the probe nothing of the dense gradient is computed."""
    topology = random_topology((64, 64), 0.9, Block(8, 8))
    values, x = array(0, topology.values_shape), array(1, (32, 64))

    def loss(values, probe):
        return jnp.sum((x @ BlockSparse(values, topology, probe)) ** 2)

    probe = jnp.zeros(topology.grid)
    ordinary = jax.jit(jax.grad(loss)).lower(values, probe).compile().as_text()
    asked = jax.jit(jax.grad(loss, 1)).lower(values, probe).compile().as_text()
    assert "f32[16,64]" in asked  # two rows of blocks, of eight, of the dense gradient
    assert "f32[16,64]" not in ordinary
    for text in (ordinary, asked):
        assert "f32[64,64]" not in text


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_lowers_for_accelerators(platform):
    """Lowered, not run: there is no such device here."""
    topology = random_topology((256, 256), 0.9, Block(128, 128))
    conv = random_topology((3, 3, 128, 128), 0.5, Block(64, 64))
    images = array(0, (2, 4, 4, 128))

    def loss(values, probe, conv_values):
        x = convolve(images, BlockSparse(conv_values, conv)).reshape(16, 256)
        return jnp.sum((x @ BlockSparse(values, topology, probe)) ** 2)

    step = jax.jit(jax.grad(loss, (0, 1, 2)))
    arguments = [
        array(0, topology.values_shape),
        jnp.zeros(topology.grid),
        array(0, conv.values_shape),
    ]
    text = jax.export.export(step, platforms=[platform])(*arguments).mlir_module()
    assert "stablehlo.dot_general" in text
    assert "batching_dims = [0] x [0]" in text  # one batched product, no loop over the blocks


def test_topologies_are_those_of_the_masked_form():
    import optax

    import rigl_optax

    params = {"a": jnp.ones((12, 9)), "b": jnp.ones((9,)), "c": jnp.ones((3, 3, 4, 6))}
    blocks = {"a": Block(4, 3), "c": Block(2, 2)}
    layers = rigl_optax.uniform(0.6)
    tx = rigl_optax.static_sparse(optax.sgd(0.1), layers, structure=blocks, seed=5)
    masks = tx.init(params).masks
    for position, name in ((0, "a"), (2, "c")):
        topology = random_topology(params[name].shape, 0.6, blocks[name], seed=5, position=position)
        grid = blocks[name].groups(masks[name])
        np.testing.assert_array_equal(topology.grid_mask(), grid)
        assert topology.number == int(grid.sum())
        assert (np.diff(topology.cols) >= 0).all()


def test_a_layer_without_blocks_is_zero():
    block = Block(4, 3)
    empty = BlockTopology(jnp.zeros(0, jnp.int32), jnp.zeros(0, jnp.int32), (8, 6), block)
    kernel = BlockSparse(jnp.zeros(empty.values_shape), empty, jnp.zeros(empty.grid))
    x = array(0, (5, 8))
    assert not (x @ kernel).any()
    scores = jax.grad(lambda p: jnp.sum(x @ BlockSparse(kernel.values, empty, p)))(kernel.probe)
    close(scores, block.pool(x.T @ jnp.ones((5, 6))))


@pytest.mark.parametrize("name", ["product", "convolution"])
def test_hessian_vector_products(name):
    if name == "product":
        kernel, x = kernel_of(*DENSE["padded"]), array(1, (5, 11))
        apply, apply_dense = matmul, matmul_dense
    else:
        kernel, x = kernel_of((3, 3, 6, 4), Block(3, 2)), array(1, (2, 4, 4, 6))
        layout = ("NHWC", "HWIO", "NHWC")
        apply = convolve
        apply_dense = lambda x, w: jax.lax.conv_general_dilated(
            x, w, (1, 1), "SAME", dimension_numbers=layout
        )
    of_dense = lambda v: apply_dense(x, BlockSparse(v, kernel.topology).dense())
    of_blocks = lambda v: apply(x, BlockSparse(v, kernel.topology))
    tangent = jnp.cos(kernel.values)
    found, wanted = (
        jax.jit(
            lambda v, f=f: jax.jvp(jax.grad(lambda v: jnp.sin(f(v)).sum()), (v,), (tangent,))[1]
        )(kernel.values)
        for f in (of_blocks, of_dense)
    )
    close(found, wanted, 1e-3, 1e-3)


@pytest.mark.parametrize("features_first", [False, True])
def test_an_empty_batch_and_one_of_any_size(features_first):
    kernel = kernel_of(*DENSE["padded"])
    topology = kernel.topology
    place = lambda shape: tuple(shape[::-1]) if features_first else shape

    def loss(values, probe, x):
        y = matmul(x, BlockSparse(values, topology, probe), features_first=features_first)
        return jnp.sum(y), y

    step = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))
    nothing = jnp.zeros(place((0, 11)))
    (dvalues, scores, dx), y = step(kernel.values, kernel.probe, nothing)
    assert y.shape == place((0, 8)) and dx.shape == nothing.shape
    assert not dvalues.any() and not scores.any()
    (batch,) = jax.export.symbolic_shape("batch")
    any_batch = jax.ShapeDtypeStruct(place((batch, 11)), jnp.float32)
    exported = jax.export.export(step)(kernel.values, kernel.probe, any_batch)
    x = array(1, place((5, 11)))
    for found, wanted in zip(
        jax.tree.leaves(exported.call(kernel.values, kernel.probe, x)),
        jax.tree.leaves(step(kernel.values, kernel.probe, x)),
        strict=True,
    ):
        close(found, wanted)


def test_from_the_left_and_transposed():
    for shape, block in DENSE.values():
        kernel = kernel_of(shape, block)
        dense, z = kernel.dense(), array(2, (shape[1], 5))
        np.testing.assert_array_equal(kernel.T.dense(), dense.T)
        for part in (z, z[:, 0], z[None], np.asarray(z)):
            close(kernel @ part, dense @ part)
    c = array(3, (shape[0], 5))  # scores: of the grid of the kernel itself, not of its transpose
    loss = lambda p, k: jnp.sum(c * (BlockSparse(k.values, k.topology, p) @ z))
    close(jax.jit(jax.grad(loss))(kernel.probe, kernel), block.pool(c @ z.T))


@pytest.mark.parametrize(
    "act, message",
    [
        (lambda k, c: k @ jnp.ones((5, 7)), r"\(12, 9\) does not fit .* \(5, 7\)"),
        (lambda k, c: c.T, r"\(3, 3, 6, 8\) is a convolution's"),
        (lambda k, c: jnp.ones((5, 7)) @ k, r"\(5, 7\) do not fit a kernel of \(12, 9\)"),
        (lambda k, c: jnp.ones((5, 6)) @ c, r"\(3, 3, 6, 8\) is a convolution's"),
        (lambda k, c: convolve(jnp.ones((1, 4, 4, 5)), c), r"do not fit a kernel of shape"),
        (lambda k, c: convolve(jnp.ones((1, 4, 4, 6)), c, strides=(1,)), "must be two"),
        (lambda k, c: random_topology((9, 9), 0.5, Block(2, 3)), "does not divide"),
        (lambda k, c: random_topology((8, 9), 1.5, Block(2, 3)), r"sparsity=1.5"),
        (lambda k, c: random_topology((8, 8), 0.5, NM(1, 4)), r"a layer has NM\(n=1, m=4\), for"),
    ],
)
def test_errors(act, message):
    kernel = kernel_of(*DENSE["even"])
    with pytest.raises(ValueError, match=message):
        act(kernel, kernel_of((3, 3, 6, 8), Block(3, 2)))


def test_numpy_activations_and_other_dtypes():
    kernel = kernel_of(*DENSE["even"])
    x = np.ones((2, 12), np.float32)
    close(x @ kernel, x @ np.asarray(kernel.dense()))
    assert (jnp.ones((2, 12), jnp.bfloat16) @ kernel).dtype == jnp.float32
    assert set(itertools.chain(kernel.topology.rows.devices())) == set(jax.devices()[:1])
