import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rigl_optax.models import lenet


def shapes(model):
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }


def test_lenet_300_100_has_the_weights_of_the_paper():
    found = shapes(lenet.LeNet((28, 28), rngs=nnx.Rngs(0)))
    assert found == {
        "layers/0/kernel": (784, 300),
        "layers/0/bias": (300,),
        "layers/1/kernel": (300, 100),
        "layers/1/bias": (100,),
        "layers/2/kernel": (100, 10),
        "layers/2/bias": (10,),
    }


def test_hidden_widths_are_configurable():
    model = lenet.LeNet((28, 28), hidden=(512, 512), rngs=nnx.Rngs(0))
    assert shapes(model)["layers/1/kernel"] == (512, 512)
    assert model(jnp.zeros((3, 28, 28))).shape == (3, 10)


def test_initial_weights_are_glorot_uniform_and_biases_zero():
    model = lenet.LeNet((28, 28), rngs=nnx.Rngs(0))
    kernel = np.asarray(model.layers[0].kernel[...])
    limit = np.sqrt(6 / (784 + 300))
    assert np.abs(kernel).max() <= limit
    assert abs(kernel.std() - limit / np.sqrt(3)) < 0.01 * limit
    assert all(not np.asarray(layer.bias[...]).any() for layer in model.layers)


def test_the_forward_pass_is_a_relu_network():
    model = lenet.LeNet((2, 2), classes=3, hidden=(5, 4), rngs=nnx.Rngs(1))
    x = np.random.default_rng(0).normal(size=(6, 2, 2)).astype(np.float32)
    expected = x.reshape(6, 4)
    for i, layer in enumerate(model.layers):
        expected = expected @ np.asarray(layer.kernel[...]) + np.asarray(layer.bias[...])
        expected = np.maximum(expected, 0) if i < 2 else expected
    np.testing.assert_allclose(model(jnp.asarray(x)), expected, rtol=1e-5, atol=1e-6)


def test_a_width_below_one_is_refused():
    with pytest.raises(ValueError, match="widths"):
        lenet.LeNet((8, 8), hidden=(0,), rngs=nnx.Rngs(0))
