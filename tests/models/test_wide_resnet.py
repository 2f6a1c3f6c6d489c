import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rigl_optax.models import dropout, vgg, wide_resnet
from tests.models import networks

IMAGE = (32, 32, 3)


@pytest.fixture(scope="module")
def params():
    return networks.shapes(lambda: wide_resnet.WideResNet(IMAGE, rngs=nnx.Rngs(0)))


def test_counts_of_wrn_22_2_layer_by_layer(params):
    expected = {"stem/kernel": (3, 3, 3, 16), "classifier/kernel": (128, 10)}
    n_in, at = 16, 0
    for n_out in (32, 64, 128):
        for _ in range(3):
            if n_in != n_out:
                expected[f"blocks/{at}/skip/kernel"] = (1, 1, n_in, n_out)
            expected[f"blocks/{at}/conv1/kernel"] = (3, 3, n_in, n_out)
            expected[f"blocks/{at}/conv2/kernel"] = (3, 3, n_out, n_out)
            n_in, at = n_out, at + 1
    assert networks.kernels(params) == expected
    assert networks.count(params) == 1_076_912  # as tests/accounting/test_published.py counts them


def test_erk_is_that_of_the_reference(params):
    # As in tests/core/test_distributions.py, the first convolution outside the budget.
    table = {
        "blocks/0/skip": (1, 1),
        "blocks/0/conv1": (0.4227, 0.2049),
        "blocks/1/conv2": (0.2740, 0.1328),
        "blocks/3/skip": (1, 0.8368),
        "blocks/6/skip": (0.8543, 0.4141),
        "blocks/8/conv2": (0.0641, 0.0311),
        "classifier": (1, 1),
    }
    for i, sparsity in enumerate((0.9, 0.95)):
        density, _ = networks.density(params, networks.sparse(wide_resnet, "erk", sparsity))
        assert "stem/kernel" not in density and len(density) == 22
        for path, expected in table.items():
            assert density[f"{path}/kernel"] == pytest.approx(expected[i], abs=1e-4), path


def test_k_and_the_width_multiply():
    def shapes(**keys):
        make = lambda: wide_resnet.WideResNet(IMAGE, 10, rngs=nnx.Rngs(0), **keys)
        return networks.kernels(networks.shapes(make))

    assert shapes(k=1, depth=10)["blocks/2/conv2/kernel"] == (3, 3, 64, 64)
    assert "blocks/0/skip/kernel" not in shapes(k=1, depth=10)
    narrow = shapes(width=0.45)
    assert narrow["stem/kernel"] == (3, 3, 3, 7) and narrow["classifier/kernel"] == (57, 10)
    for keys in ({"depth": 20}, {"depth": 4}, {"k": 0}, {"dropout": 1.0}):
        with pytest.raises(ValueError, match=f"{next(iter(keys))}="):
            shapes(**keys)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_flow_and_each_block_drops_once(dtype):
    make = lambda: wide_resnet.WideResNet(
        (8, 8), 3, 0.25, depth=10, k=1, dropout=0.3, dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0)
    )
    logits, grads, before, after = networks.gradients(make, (8, 8))
    assert logits.dtype == jnp.float32
    assert all(np.any(g) and g.dtype == jnp.float32 for p, g in grads.items() if "kernel" in p)
    calls = [x for x in jax.tree.leaves(after) if x.dtype == jnp.int32]
    assert len(calls) == 3 and all(int(x) == 1 for x in calls)


def test_strided_windows_are_tensorflows():
    block = wide_resnet.Block(4, 8, 2, drop=0.0, dtype=None, rngs=nnx.Rngs(0))
    assert block.conv1.strides == block.skip.strides == (2, 2) and block.conv1.padding == "SAME"
    assert (block.norm1.momentum, block.norm1.epsilon) == (0.9, 1e-5)
    largest = np.abs(block.conv2.kernel[...]).max()
    assert 0.8 * np.sqrt(6 / 144) < largest <= np.sqrt(6 / 144)  # Glorot's: 9 * (8 + 8)


def test_what_is_dropped_is_a_function_of_key_and_calls():
    layer = dropout.Dropout(0.3, rngs=nnx.Rngs(0))
    x = jnp.ones(10_000)
    first, second = layer(x), layer(x)
    assert np.any(first != second)
    assert np.mean(first == 0) == pytest.approx(0.3, abs=0.02)
    assert float(first.max()) == pytest.approx(1 / 0.7) and float(first.mean()) == pytest.approx(
        1, abs=0.02
    )
    resumed = dropout.Dropout(0.3, rngs=nnx.Rngs(0))
    resumed.calls[...] = jnp.int32(1)
    assert np.array_equal(resumed(x), second)
    layer.eval()
    assert np.array_equal(layer(x), x) and int(layer.calls[...]) == 2


def test_vgg_16_is_that_of_the_reference():
    found = networks.shapes(lambda: vgg.VGG((224, 224, 3), rngs=nnx.Rngs(0)))
    shapes = networks.kernels(found)
    assert networks.count(found) == networks.size(found) == 14_710_464 + 512 * 1000
    assert len(shapes) == 14 and shapes["convs/12/kernel"] == (3, 3, 512, 512)
    for name, layers in (("erk", 14), ("uniform", 13)):
        assert len(networks.density(found, networks.sparse(vgg, name, 0.9))[0]) == layers
    make = lambda: vgg.VGG((16, 16), 3, 1 / 16, depth=11, rngs=nnx.Rngs(0))
    _, grads, _, _ = networks.gradients(make, (16, 16))
    assert all(np.any(g) for g in grads.values())
    with pytest.raises(ValueError, match="depth=13: must be one of 11, 16, 19"):
        vgg.VGG((16, 16), depth=13, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"image_shape=\(8, 8\)"):
        vgg.VGG((8, 8), rngs=nnx.Rngs(0))
