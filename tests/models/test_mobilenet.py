import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rigl_optax.models import convolution, mobilenet_v1, mobilenet_v2
from tests.models import networks

IMAGE = (224, 224, 3)
V1, V2 = mobilenet_v1.MobileNetV1, mobilenet_v2.MobileNetV2


@pytest.fixture(scope="module")
def params():
    return {make: networks.shapes(lambda: make(IMAGE, rngs=nnx.Rngs(0))) for make in (V1, V2)}  # noqa: B023


def test_counts(params):
    # Kernels as tests/accounting/test_published.py counts them; parameters as Keras trains.
    assert (networks.count(params[V1]), networks.size(params[V1])) == (4_209_088, 4_231_976)
    assert (networks.count(params[V2]), networks.size(params[V2])) == (3_469_760, 3_504_872)


def test_v1_layer_by_layer(params):
    outs = [64, 128, 128, 256, 256, *[512] * 6, 1024, 1024]
    expected = {"stem/kernel": (3, 3, 3, 32), "classifier/kernel": (1024, 1000)}
    for i, (n_in, n_out) in enumerate(zip([32, *outs], outs, strict=False)):
        expected[f"blocks/{i}/depthwise/kernel"] = (3, 3, 1, n_in)
        expected[f"blocks/{i}/pointwise/kernel"] = (1, 1, n_in, n_out)
    assert networks.kernels(params[V1]) == expected


def test_v2_layer_by_layer(params):
    outs = [16, 24, 24, *[32] * 3, *[64] * 4, *[96] * 3, *[160] * 3, 320]
    expected = {"stem/kernel": (3, 3, 3, 32), "classifier/kernel": (1280, 1000)}
    expected["head/kernel"] = (1, 1, 320, 1280)
    for i, (n_in, n_out) in enumerate(zip([32, *outs], outs, strict=False)):
        n_mid = 6 * n_in if i else n_in
        if i:
            expected[f"blocks/{i}/expand/kernel"] = (1, 1, n_in, n_mid)
        expected[f"blocks/{i}/depthwise/kernel"] = (3, 3, 1, n_mid)
        expected[f"blocks/{i}/project/kernel"] = (1, 1, n_mid, n_out)
    assert networks.kernels(params[V2]) == expected


def test_first_and_depthwise_convolutions_are_dense(params):
    for make, module in ((V1, mobilenet_v1), (V2, mobilenet_v2)):
        for name in ("erk", "uniform"):
            density, active = networks.density(params[make], networks.sparse(module, name, 0.75))
            left = {path for path in networks.kernels(params[make]) if path not in density}
            assert left == {
                p for p in networks.kernels(params[make]) if "depthwise" in p or "stem" in p
            }
            # With the dense layers counted, 74.2 % of v1's weights are zero and 73.6 % of v2's.
            dense = networks.count(params[make]) - sum(
                np.prod(networks.kernels(params[make])[path]) for path in density
            )
            real = 1 - (active + dense) / networks.count(params[make])
            assert real == pytest.approx(0.742 if make is V1 else 0.736, abs=5e-4)
    reason = networks.sparse(mobilenet_v1, "erk", 0.5).dense.reason
    assert "depthwise" in reason("blocks/0/depthwise/kernel", jnp.ones((3, 3, 1, 8)))


def test_erk_of_v1_is_that_of_the_reference(params):
    # As in tests/accounting/test_published.py, where the classifier is a 1x1 convolution and the
    # densities differ in the 4th digit.
    for sparsity, expected in ((0.75, {5: 0.4800, 12: 0.1597}), (0.9, {1: 0.7626, 3: 0.3793})):
        density, _ = networks.density(params[V1], networks.sparse(mobilenet_v1, "erk", sparsity))
        for block, value in expected.items():
            found = density[f"blocks/{block}/pointwise/kernel"]
            assert found == pytest.approx(value, abs=3e-4)


def test_channels_are_rounded_as_in_the_reference():
    assert [convolution.make_divisible(v) for v in (32 * 0.47, 11.2, 3, 40, 44)] == [
        16,
        16,
        8,
        40,
        48,
    ]
    found = networks.kernels(networks.shapes(lambda: V1(IMAGE, 10, 0.47, rngs=nnx.Rngs(0))))
    assert found["stem/kernel"] == (3, 3, 3, 16)  # 15.04
    assert found["blocks/0/pointwise/kernel"] == (1, 1, 16, 30)  # whole channels only
    assert found["blocks/12/pointwise/kernel"] == (1, 1, 480, 480)
    found = networks.kernels(networks.shapes(lambda: V2(IMAGE, 10, 0.5, rngs=nnx.Rngs(0))))
    assert found["head/kernel"] == (1, 1, 160, 1280)  # never fewer
    found = networks.kernels(networks.shapes(lambda: V2(IMAGE, 10, 1.4, rngs=nnx.Rngs(0))))
    assert found["head/kernel"] == (1, 1, 448, 1792)


@pytest.mark.parametrize(
    ("module", "make", "dtype"), [(mobilenet_v1, V1, "float32"), (mobilenet_v2, V2, "bfloat16")]
)
def test_gradients_flow_into_every_layer(monkeypatch, module, make, dtype):
    monkeypatch.setattr(module, "BLOCKS", module.BLOCKS[:3])
    made = lambda: make((16, 16), 3, 0.25, dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0))
    logits, grads, _, _ = networks.gradients(made, (16, 16))
    assert logits.dtype == jnp.float32 and logits.shape == (4, 3)
    assert all(np.any(g) and g.dtype == jnp.float32 for p, g in grads.items() if "kernel" in p)


def test_how_a_block_starts_and_where_it_strides():
    block = mobilenet_v1.Block(16, 32, 2, dtype=None, rngs=nnx.Rngs(0))
    assert block.depthwise.strides == (2, 2) and block.depthwise.padding == [(1, 1), (1, 1)]
    assert (block.depthwise_norm.momentum, block.depthwise_norm.epsilon) == (0.9, 1e-5)
    bound = np.sqrt(6 / (9 + 9 * 16))  # Glorot's, in either layout of the kernel
    largest = np.abs(block.depthwise.kernel[...]).max()
    assert 0.8 * bound < largest <= bound
    assert np.std(block.pointwise.kernel[...]) == pytest.approx(np.sqrt(1 / 16), rel=0.15)
    assert mobilenet_v2.Block(8, 8, 1, 6, dtype=None, rngs=nnx.Rngs(0)).has_skip
    assert not mobilenet_v2.Block(8, 8, 2, 6, dtype=None, rngs=nnx.Rngs(0)).has_skip
