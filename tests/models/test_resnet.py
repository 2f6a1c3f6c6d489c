import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rigl_optax import accounting
from rigl_optax.models import resnet
from tests.models import networks

IMAGE = (224, 224, 3)


@pytest.fixture(scope="module")
def params():
    return networks.shapes(lambda: resnet.ResNet(IMAGE, rngs=nnx.Rngs(0)))


# All parameters, as everywhere else; but 18 and 34 have a projection in the first stage too, like
# the reference: 4,096 weights and 128 parameters more.
@pytest.mark.parametrize(
    ("depth", "layers", "everything"),
    [(18, 22, 11_689_512 + 4_224), (34, 38, 21_797_672 + 4_224), (101, 105, 44_549_160)],
)
def test_counts(depth, layers, everything):
    found = networks.shapes(lambda: resnet.ResNet(IMAGE, depth=depth, rngs=nnx.Rngs(0)))
    assert (len(networks.kernels(found)), networks.size(found)) == (layers, everything)


def test_counts_of_50_layer_by_layer(params):
    found = networks.kernels(params)
    assert networks.count(params) == 25_502_912 and networks.size(params) == 25_557_032
    expected = {"stem/kernel": (7, 7, 3, 64), "classifier/kernel": (2048, 1000)}
    n_in = 64
    for stage, (width, count) in enumerate(zip((64, 128, 256, 512), (3, 4, 6, 3), strict=True)):
        for i in range(count):
            at = f"stages/{stage}/{i}"
            if i == 0:
                expected[f"{at}/projection/kernel"] = (1, 1, n_in, 4 * width)
            expected[f"{at}/convs/0/kernel"] = (1, 1, n_in, width)
            expected[f"{at}/convs/1/kernel"] = (3, 3, width, width)
            expected[f"{at}/convs/2/kernel"] = (1, 1, width, 4 * width)
            n_in = 4 * width
    assert found == expected and len(expected) == 54


def test_erk_is_that_of_the_reference(params):
    # As in tests/core/test_distributions.py: active weights of all kernels, and densities of some.
    counts = {0.8: 5_100_630, 0.9: 2_550_353, 0.95: 1_275_200, 0.965: 892_651, 0.99: 255_082}
    for sparsity, expected in counts.items():
        density, active = networks.density(params, networks.sparse(resnet, "erk", sparsity))
        assert active == expected and len(density) == 54
        if sparsity == 0.9:
            assert density["stem/kernel"] == pytest.approx(0.4200, abs=5e-5)
            assert density["stages/0/0/convs/0/kernel"] == 1
            assert density["stages/2/3/convs/1/kernel"] == pytest.approx(0.0428, abs=5e-5)
            assert density["classifier/kernel"] == pytest.approx(0.0726, abs=5e-5)


def test_uniform_keeps_the_first_convolution_dense(params):
    density, _ = networks.density(params, networks.sparse(resnet, "uniform", 0.9))
    assert len(density) == 53 and "stem/kernel" not in density
    assert set(np.round(list(density.values()), 6)) == {0.1}
    dense = networks.sparse(resnet, "uniform", 0.9).dense
    assert "first convolution" in dense.reason("stem/kernel", params["stem"]["kernel"])


def test_its_products_are_those_of_resnet_50(params):
    model = nnx.eval_shape(lambda: resnet.ResNet(IMAGE, rngs=nnx.Rngs(0)))
    graphdef, _, state = nnx.split(model, nnx.Param, ...)
    state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), nnx.to_pure_dict(state))

    def forward(params, images):
        merged = nnx.merge(graphdef, params, state)
        merged.eval()
        return merged(images)

    image = jax.ShapeDtypeStruct((1, *IMAGE), jnp.float32)
    cost = accounting.count_flops(forward, params, image)
    # 4.089 GMACs with the stride in the 3x3; 3.858 with it in the first 1x1.
    assert sum(cost.by_parameter[path] for path in networks.kernels(params)) == 2 * 4_089_184_256


def test_width_multiplies_all_channels():
    found = networks.shapes(lambda: resnet.ResNet(IMAGE, 10, 0.465, rngs=nnx.Rngs(0)))
    shapes = networks.kernels(found)
    assert shapes["stem/kernel"] == (7, 7, 3, 29)  # int(.465 * 64)
    assert shapes["stages/3/2/convs/2/kernel"] == (1, 1, 238, 952)


@pytest.mark.parametrize(("bottleneck", "dtype"), [(False, "float32"), (True, "bfloat16")])
def test_gradients_flow_and_statistics_move(monkeypatch, bottleneck, dtype):
    monkeypatch.setitem(resnet.DEPTHS, 10, ((1, 1, 1, 1), bottleneck))
    make = lambda: resnet.ResNet(
        (16, 16), 3, 1 / 16, depth=10, dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0)
    )
    logits, grads, before, after = networks.gradients(make, (16, 16))
    assert logits.dtype == jnp.float32 and np.isfinite(logits).all()
    assert all(np.any(g) and g.dtype == jnp.float32 for p, g in grads.items() if "kernel" in p)
    pairs = zip(*map(jax.tree.leaves, (before, after)), strict=True)
    assert all(bool(np.any(a != b)) and b.dtype == jnp.float32 for a, b in pairs)


@pytest.mark.parametrize("bottleneck", [False, True])
def test_how_a_block_starts_and_where_it_strides(bottleneck):
    block = resnet.Block(
        16, 8, 2, is_bottleneck=bottleneck, projects=True, dtype=None, rngs=nnx.Rngs(0)
    )
    strides = [conv.strides for conv in block.convs]
    assert strides == ([(1, 1), (2, 2), (1, 1)] if bottleneck else [(2, 2), (1, 1)])
    assert block.projection.strides == (2, 2)
    strided = block.convs[1 if bottleneck else 0]
    assert strided.padding == [(1, 1), (1, 1)]
    assert not np.any(block.norms[-1].scale[...]) and np.all(block.norms[0].scale[...] == 1)
    assert (block.norms[0].momentum, block.norms[0].epsilon) == (0.9, 1e-5)
    fan_in = np.prod(strided.kernel.shape[:-1])  # not He's 2 / fan_in
    assert np.std(strided.kernel[...]) == pytest.approx(np.sqrt(1 / fan_in), rel=0.1)
    # What comes out at first is the skip alone.
    images = jnp.asarray(np.random.default_rng(0).random((2, 6, 6, 16)), jnp.float32)
    skip = nnx.relu(block.projection_norm(block.projection(images)))
    np.testing.assert_array_equal(block(images), skip)


def test_what_there_is_not_is_refused():
    with pytest.raises(ValueError, match="depth=20: must be one of 18, 34, 50, 101"):
        resnet.ResNet(IMAGE, depth=20, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"image_shape=\(224,\)"):
        resnet.ResNet((224,), rngs=nnx.Rngs(0))
