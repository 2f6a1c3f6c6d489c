"""Depthwise convolutions as sums of shifted images are XLA's grouped ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import rigl_optax
from rigl_optax import condensed
from rigl_optax.accounting import count_flops
from rigl_optax.models import convolution, layers
from rigl_optax.models.depthwise import depthwise


def grouped(x, kernel, strides, padding):
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        strides,
        padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1],
    )


@pytest.mark.parametrize(
    "window, strides, padding",
    [
        ((3, 3), (1, 1), ((1, 1), (1, 1))),
        ((3, 3), (2, 2), ((0, 1), (0, 1))),
        ((3, 2), (1, 2), ((0, 0), (2, 1))),
        ((1, 1), (2, 1), ((0, 0), (0, 0))),
        ((5, 5), (2, 2), ((2, 2), (2, 2))),
    ],
)
def test_values_and_gradients(window, strides, padding):
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        x = jnp.asarray(rng.standard_normal((2, 7, 6, 4)))
        kernel = jnp.asarray(rng.standard_normal((*window, 1, 4)))

        def all_three(product, dy):
            y, pull = jax.vjp(lambda x, k: product(x, k, strides, padding), x, kernel)
            return y, *pull(dy)

        shape = jax.eval_shape(lambda: grouped(x, kernel, strides, padding)).shape
        dy = jnp.asarray(rng.standard_normal(shape))
        found, wanted = (jax.jit(all_three, static_argnums=0)(f, dy) for f in (depthwise, grouped))
        for a, b in zip(found, wanted, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("padding", [None, "SAME", "VALID"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_layer_is_that_of_flax(padding, dtype):
    layer = convolution.conv(6, 6, 3, 2, groups=6, padding=padding, dtype=dtype, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (2, 8, 8, 6))
    y, wanted = layer(x), nnx.Conv.__call__(layer, x)
    assert y.shape == wanted.shape and y.dtype == dtype
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == jnp.float32 else {"rtol": 0.05, "atol": 0.05}
    np.testing.assert_allclose(y.astype(jnp.float32), wanted.astype(jnp.float32), **close)


@pytest.mark.parametrize(
    "keys",
    [
        {"strides": 1},
        {"strides": None, "kernel_dilation": 2},
        {"kernel_dilation": (2, 1), "use_bias": True},
        {"strides": 2, "use_bias": True, "dtype": jnp.bfloat16},
        {"padding": 1, "strides": (2, 1)},
        {"padding": (1, (0, 2))},
        {"padding": "CIRCULAR"},
        {"input_dilation": 2, "padding": 1},
    ],
    ids=str,
)
def test_all_options_of_flax_mean_what_they_mean_there(keys):
    keys = {"use_bias": False} | keys
    made = [
        kind(4, 4, (3, 3), feature_group_count=4, rngs=nnx.Rngs(0), **keys)
        for kind in (layers.Conv, nnx.Conv)
    ]
    x = jax.random.normal(jax.random.key(1), (2, 8, 8, 4))
    for layer in made:
        if layer.bias is not None:
            layer.bias[...] = jnp.arange(4.0)
    found, wanted = (layer(x) for layer in made)
    assert found.shape == wanted.shape and found.dtype == wanted.dtype
    close = 1e-5 if "dtype" not in keys else 0.05
    found, wanted = (y.astype(jnp.float32) for y in (found, wanted))
    np.testing.assert_allclose(found, wanted, rtol=close, atol=close)
    np.testing.assert_allclose(made[0](x[0]), made[1](x[0]), rtol=close, atol=close)


@pytest.mark.parametrize("keys", [{"use_bias": True, "strides": 2}, {"padding": 1}], ids=str)
def test_stored_blocks_take_a_bias_and_all_forms_of_strides(keys):
    dense = nnx.Conv(4, 8, (3, 3), rngs=nnx.Rngs(0), **{"use_bias": False} | keys)
    layer = layers.Conv(4, 8, (3, 3), rngs=nnx.Rngs(0), **{"use_bias": False} | keys)
    mask = np.zeros((3, 3, 4, 8), bool)
    mask[..., :2, 4:] = True
    kernel = jnp.where(mask, dense.kernel[...], 0)
    dense.kernel[...] = kernel
    stored = condensed.condense({"kernel": kernel}, {"kernel": mask}, rigl_optax.Block(2, 4))
    bound = condensed.bind(*stored)["kernel"]
    if dense.bias is not None:
        dense.bias[...] = layer.bias[...] = jnp.arange(8.0)
    graphdef, params = nnx.split(layer)
    params = nnx.to_pure_dict(params) | {"kernel": bound}
    x = jax.random.normal(jax.random.key(1), (2, 6, 6, 4))
    np.testing.assert_allclose(nnx.merge(graphdef, params)(x), dense(x), rtol=1e-5, atol=1e-5)


def test_what_blocks_cannot_do_is_said():
    for keys, reason in (
        ({"kernel_dilation": 2}, "kernel_dilation is 2"),
        ({"feature_group_count": 2}, "2 groups"),
        ({"padding": "CIRCULAR"}, "padding is 'CIRCULAR'"),
    ):
        layer = layers.Conv(4, 4, (3, 3), rngs=nnx.Rngs(0), **keys)
        assert reason in layers.refused(layer, ["kernel"])["kernel"]


def test_its_flops_are_counted_as_of_a_convolution():
    kernel = jax.ShapeDtypeStruct((3, 3, 1, 4), jnp.float32)
    x = jax.ShapeDtypeStruct((1, 6, 6, 4), jnp.float32)
    ones = ((1, 1), (1, 1))
    cost = count_flops(lambda p, x: depthwise(x, p["kernel"], (1, 1), ones), {"kernel": kernel}, x)
    wanted = count_flops(lambda p, x: grouped(x, p["kernel"], (1, 1), ones), {"kernel": kernel}, x)
    assert cost.by_parameter == wanted.by_parameter and not cost.notes


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_on_accelerators_it_is_a_convolution(platform):
    x, kernel = jnp.ones((1, 6, 6, 4)), jnp.ones((3, 3, 1, 4))
    function = jax.jit(lambda x, k: depthwise(x, k, (1, 1), ((1, 1), (1, 1))))
    assert (
        "convolution" in jax.export.export(function, platforms=[platform])(x, kernel).mlir_module()
    )
    assert "convolution" not in function.lower(x, kernel).as_text()
