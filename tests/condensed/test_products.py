"""Each product of stored blocks against the default one, and the table that chooses."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from rigl_optax import Block
from rigl_optax.condensed import BlockSparse, BlockTopology, convolve, products, random_topology
from rigl_optax.condensed.blocks import _pallas_tpu, _table

OTHERS = ["ragged", "pallas"]  # those that run on the CPU
RAGGED = {(None, None, None): "ragged"}
TOLERANCES = {"float32": 1e-5, "bfloat16": 2e-2, "float64": 1e-13}


def topology_of(shape, block, places):
    rows, cols = np.array(sorted(places, key=lambda p: (p[1], p[0])), np.int32).reshape(-1, 2).T
    return BlockTopology(jnp.asarray(rows), jnp.asarray(cols), shape, block)


CASES = {
    "random": (random_topology((32, 24), 0.5, Block(8, 8)), (5, 32)),
    "oblong": (random_topology((24, 32), 0.6, Block(8, 16)), (2, 3, 24)),
    "padded": (random_topology((21, 13), 0.4, Block(8, 8, pool_by="l2", pad=True)), (9, 21)),
    "one block": (topology_of((24, 16), Block(8, 8, pool_by="max"), [(1, 1)]), (4, 24)),
    "uneven": (topology_of((24, 32), Block(8, 8), [(0, 1), (1, 1), (2, 1), (2, 3)]), (4, 24)),
    "no blocks": (topology_of((16, 16), Block(8, 8), []), (4, 16)),
    "all blocks": (random_topology((16, 16), 0.0, Block(8, 8)), (4, 16)),
    "no rows": (random_topology((16, 16), 0.5, Block(8, 8)), (0, 16)),
}


def drawn(seed, shape, dtype="float32"):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def results(topology, values, x, probe=None, product=None):
    """A product, the gradients of values and activations, and the scores."""
    probe = topology.probe() if probe is None else probe

    @jax.jit
    def whole(values, probe, x):
        y, pull = jax.vjp(lambda v, p, x: x @ BlockSparse(v, topology, p), values, probe, x)
        return (y, *pull(jnp.cos(y)))

    with products({} if product is None else {(None, None, None): product}):
        return whole(values, probe, x)


def agree(got, wanted, tolerance):
    for a, b in zip(got, wanted, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        np.testing.assert_allclose(
            np.asarray(a, np.float64), np.asarray(b, np.float64), rtol=tolerance, atol=tolerance
        )


@pytest.mark.parametrize("product", OTHERS)
@pytest.mark.parametrize("name", CASES)
def test_products_and_gradients_are_those_of_the_default(name, product):
    topology, shape = CASES[name]
    values = topology.clear_padding(drawn(0, topology.values_shape))
    x = drawn(1, shape)
    agree(results(topology, values, x, product=product), results(topology, values, x), 2e-5)


@pytest.mark.parametrize(
    ("dtype", "product"),
    [("bfloat16", "ragged"), ("float64", "ragged"), ("bfloat16", "pallas")],
)
def test_other_dtypes(dtype, product):
    topology, shape = CASES["oblong"]
    with jax.enable_x64(dtype == "float64"):
        values, x = drawn(0, topology.values_shape, dtype), drawn(1, shape, dtype)
        got, wanted = (results(topology, values, x, product=p) for p in (product, None))
    agree(got, wanted, TOLERANCES[dtype])


def test_kernels_refuse_float64():
    topology, shape = CASES["random"]
    with jax.enable_x64(True):
        values, x = drawn(0, topology.values_shape, "float64"), drawn(1, shape, "float64")
        with pytest.raises(ValueError, match="adds up in float32; got float64"):
            results(topology, values, x, product="pallas")


def primitives(function, *args):
    return str(jax.make_jaxpr(function)(*args))


def test_the_first_entry_that_fits_decides():
    topology, shape = CASES["oblong"]
    values, x = drawn(0, topology.values_shape), drawn(1, shape)

    def used(table, values=values):
        def product(x, values):
            return x @ BlockSparse(values, topology)

        with products(table):
            return "ragged_dot_general" in primitives(product, x, values)

    assert not used({}) and used(RAGGED)
    assert used({("cuda", (8, 16), "float32"): "ragged"})
    assert used({("tpu", None, jnp.float32): "ragged"})
    assert not used({(None, (16, 8), None): "ragged"})
    assert not used({(None, 8, None): "ragged"})
    assert not used({(None, None, "bfloat16"): "ragged"})
    assert used({(None, None, "bfloat16"): "ragged"}, values.astype("bfloat16")) is False
    assert not used({(None, (8, 16), None): "batched", **RAGGED})


def test_entries_of_other_platforms_change_nothing_here():
    topology, shape = CASES["random"]
    values, x = drawn(0, topology.values_shape), drawn(1, shape)

    def flops_and_result():
        compiled = jax.jit(lambda x: x @ BlockSparse(values, topology)).lower(x).compile()
        return compiled.cost_analysis()["flops"], compiled(x)

    flops, y = flops_and_result()
    with products({("cuda", None, None): "ragged", ("tpu", 8, None): "ragged"}):
        again, same = flops_and_result()
    assert again == flops and np.array_equal(same, y)


def test_compiled_functions_follow_the_table():
    topology, shape = CASES["random"]
    values, x = drawn(0, topology.values_shape), drawn(1, shape)
    traced = []

    @jax.jit
    def product(x):
        traced.append(_table.chosen(topology.block, x.dtype)[0])
        return x @ BlockSparse(values, topology)

    product(x)
    with products(RAGGED):
        product(x)
        with products({("cpu", None, None): "batched", **RAGGED}):
            product(x)
    product(x)
    assert traced == ["batched", "ragged", "batched"]


def test_the_backward_pass_uses_the_product_of_the_forward_pass():
    topology, shape = CASES["random"]
    values, x = drawn(0, topology.values_shape), drawn(1, shape)
    with products(RAGGED):
        y, pull = jax.vjp(lambda x: x @ BlockSparse(values, topology), x)
    assert "ragged_dot_general" in primitives(pull, y)


def test_1x1_convolutions_too():
    topology = random_topology((1, 1, 16, 24), 0.5, Block(8, 8))
    values, x = drawn(0, topology.values_shape), drawn(1, (2, 3, 3, 16))

    def convolved(x):
        return convolve(x, BlockSparse(values, topology), strides=(2, 2))

    plain = jax.jit(convolved)(x)
    with products(RAGGED):
        assert "ragged_dot_general" in primitives(convolved, x)
        agree([jax.jit(convolved)(x)], [plain], 1e-5)


def test_hessian_vector_products_of_the_ragged_product():
    topology, shape = CASES["random"]
    values, x = drawn(0, topology.values_shape), drawn(1, shape)

    @jax.jit
    def hvp(v):
        def loss(values):
            return jnp.sum(jnp.sin(x @ BlockSparse(values, topology)))

        return jax.jvp(jax.grad(loss), (values,), (v,))[1]

    plain = hvp(values)
    with products(RAGGED):
        agree([hvp(values)], [plain], 1e-4)


@pytest.mark.parametrize("axis_type", ["Auto", "Explicit"])
def test_a_batch_spread_over_devices(axis_type):
    kind = getattr(jax.sharding.AxisType, axis_type)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(kind,))
    topology, _ = CASES["uneven"]
    values, x = drawn(0, topology.values_shape), drawn(1, (8, 24))
    wanted = results(topology, values, x)
    with jax.set_mesh(mesh):
        whole, cut = (NamedSharding(mesh, PartitionSpec(*p)) for p in ((), ("data",)))
        values, probe = (jax.device_put(a, whole) for a in (values, topology.probe()))
        got = results(topology, values, jax.device_put(x, cut), probe, "ragged")
    agree(jax.device_get(got), wanted, 2e-5)


def explicit(*shapes):
    """A mesh of explicit axes and arrays whose first one is cut."""
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    specs = (PartitionSpec("data"), PartitionSpec())
    return mesh, [
        jax.ShapeDtypeStruct(s, "bfloat16", sharding=NamedSharding(mesh, spec))
        for s, spec in zip(shapes, specs, strict=True)
    ]


def test_kernels_on_many_devices_are_lowered_but_not_interpreted():
    topology = random_topology((256, 256), 0.5, Block(128, 128))
    mesh, args = explicit((64, 256), topology.values_shape)

    def whole(x, values):
        y, pull = jax.vjp(lambda x, v: x @ BlockSparse(v, topology), x, values)
        return pull(y)

    with jax.set_mesh(mesh), products({("tpu", None, None): "pallas"}):
        exported = jax.export.export(jax.jit(whole), platforms=["tpu"])(*args)
    assert kernels(exported.mlir_module()) == 3
    with (
        jax.set_mesh(mesh),
        products({("cpu", None, None): "pallas"}),
        pytest.raises(ValueError, match="'pallas' on 'cpu': JAX interprets no kernels"),
    ):
        jax.eval_shape(whole, *args)


def kernels(text):
    """How many kernels for TPUs a lowered program calls."""
    return len(re.findall(r"custom_call @tpu_custom_call", text))


@pytest.mark.parametrize("size", [64, 128, 256])
def test_kernels_are_lowered_for_tpus(size):
    topology = random_topology((2 * size, 3 * size), 0.3, Block(size, size))
    shapes = (40, 2 * size), topology.values_shape

    def whole(x, values):
        y, pull = jax.vjp(lambda x, v: x @ BlockSparse(v, topology), x, values)
        return pull(y)

    args = [jax.ShapeDtypeStruct(s, "bfloat16") for s in shapes]
    with products({("tpu", size, "bfloat16"): "pallas"}):
        exported = jax.export.export(jax.jit(whole), platforms=["tpu"])(*args)
    assert kernels(exported.mlir_module()) == 3


def test_kernels_take_blocks_as_wide_as_tiles_in_place(monkeypatch):
    """Columns of activations are cut out within a kernel; no copy of them lies block by block."""
    monkeypatch.setattr(_pallas_tpu, "LANES", 8)
    monkeypatch.setattr(_pallas_tpu, "TILE", 16)
    monkeypatch.setattr(_pallas_tpu, "PANEL", 2 * 16 * 128 * 4)  # so that dy comes in parts
    topology = random_topology((24, 32), 0.5, Block(8, 16, pad=True))
    values, x = drawn(0, topology.values_shape), drawn(1, (40, 24))
    agree(results(topology, values, x, product="pallas"), results(topology, values, x), 2e-5)


def test_kernels_need_to_know_the_batch():
    topology, _ = CASES["random"]
    values = drawn(0, topology.values_shape)
    (batch,) = jax.export.symbolic_shape("batch")
    with (
        products({("tpu", None, None): "pallas"}),
        pytest.raises(ValueError, match="size of the batch must be known"),
    ):
        jax.export.export(jax.jit(lambda x: x @ BlockSparse(values, topology)))(
            jax.ShapeDtypeStruct((batch, 32), "float32")
        )


BAD = {
    "platform 'gpu': must be None or one of cpu, cuda": {("gpu", None, None): "ragged"},
    "product 'pallas' on 'cuda': it exists on cpu, tpu": {("cuda", None, None): "pallas"},
    "product 'mosaic_gpu' on 'cpu': it exists on cuda": {("cpu", None, None): "mosaic_gpu"},
    "product 'dense': must be one of batched, ragged": {(None, None, None): "dense"},
    "block 0: must be None, a positive number": {(None, 0, None): "ragged"},
    "block .1, 2, 3.: must be": {(None, (1, 2, 3), None): "ragged"},
    "must be .platform, block, dtype.": {("cuda", 8): "ragged"},
}


@pytest.mark.parametrize("words", BAD)
def test_tables_that_say_nothing_are_refused(words):
    with pytest.raises(ValueError, match=words), products(BAD[words]):
        pass
    with pytest.raises(TypeError), products({(None, None, "float33"): "ragged"}):
        pass


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_the_ragged_product_is_one_instruction_on_accelerators(platform):
    topology, shape = CASES["random"]
    values, x = (drawn(0, s, "bfloat16") for s in (topology.values_shape, shape))

    def whole(values, x):
        y, pull = jax.vjp(lambda v, x: x @ BlockSparse(v, topology), values, x)
        return pull(y)

    with products({(platform, None, None): "ragged"}):
        exported = jax.export.export(jax.jit(whole), platforms=[platform])(values, x)
    text = exported.mlir_module()
    # The product, and both gradients.
    calls = re.findall(r"custom_call.*@chlo.ragged_dot|composite.*chlo.ragged_dot", text)
    assert len(calls) == 3
