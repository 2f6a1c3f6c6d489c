"""Our own count of ResNet-50, from a forward pass in plain JAX and nothing but shapes."""

import time

import jax
import jax.numpy as jnp
import pytest

import rigl_optax
from rigl_optax.accounting import (
    count_flops,
    flops_at_sparsity,
    published_cost,
    training_cost,
)
from tests.accounting import published

PARAMS = {
    x.name: {"kernel": jax.ShapeDtypeStruct(x.shape, jnp.float32)} for x in published.resnet50()
}


def conv(params, name, x, stride=1):
    kernel = params[name]["kernel"].astype(x.dtype)
    pad = kernel.shape[0] // 2
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        [(pad, pad)] * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def forward(params, x):
    x = jax.nn.relu(conv(params, "conv1", x, 2))
    x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, 2, 2, 1), "SAME")
    for stage, blocks in zip((2, 3, 4, 5), (3, 4, 6, 3), strict=True):
        for block in range(blocks):
            name = f"{stage}{'abcdef'[block]}"
            stride = 2 if stage > 2 and block == 0 else 1
            residual = conv(params, f"{name}_projection", x, stride) if block == 0 else x
            y = jax.nn.relu(conv(params, f"{name}_2a", x))
            y = jax.nn.relu(conv(params, f"{name}_2b", y, stride))
            x = jax.nn.relu(conv(params, f"{name}_2c", y) + residual)
    return x.mean((1, 2)) @ params["classifier"]["kernel"]


@pytest.fixture(scope="module")
def cost():
    started = time.monotonic()
    counted = count_flops(forward, PARAMS, jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32))
    assert time.monotonic() - started < 60  # seconds, on any machine: nothing is computed
    return counted


def test_dense(cost):
    assert cost.total == 2 * 4_089_184_256  # 4.089 GMACs, as torchvision gives for ResNet-50
    assert cost.unattributed == () and cost.notes == ()
    assert len([flops for flops in cost.by_parameter.values() if flops]) == 54


def test_depends_on_the_batch_only_by_its_size(cost):
    batch = count_flops(forward, PARAMS, jax.ShapeDtypeStruct((32, 224, 224, 3), jnp.bfloat16))
    assert batch.by_parameter == {path: 32 * flops for path, flops in cost.by_parameter.items()}


def test_gradient_is_twice_the_forward_pass_more(cost):
    def loss(params, x):
        return forward(params, x).sum()

    image = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    both = count_flops(jax.grad(loss), PARAMS, image)
    stem = cost.by_parameter["conv1/kernel"]  # nobody needs the gradient of the image
    assert both.total == pytest.approx(3 * cost.total - stem, rel=0.02)


# Multiply-adds alone: the columns "ours" of docs/accounting.md.
@pytest.mark.parametrize(
    ("sparsity", "erk", "uniform"),
    [
        (0.8, 0.4138, 0.2231),
        (0.9, 0.2418, 0.1260),
        (0.95, 0.1217, 0.0774),
        (0.965, 0.0852, 0.0628),
        (0.99, 0.0243, 0.0386),
    ],
)
def test_sparse_fractions(cost, sparsity, erk, uniform):
    got = flops_at_sparsity(cost, rigl_optax.erk(sparsity)(PARAMS)) / cost.total
    assert got == pytest.approx(erk, abs=5.1e-5)
    first_dense = rigl_optax.uniform(sparsity, overrides={"conv1": 0.0})
    got = flops_at_sparsity(cost, first_dense(PARAMS)) / cost.total
    assert got == pytest.approx(uniform, abs=5.1e-5)


def test_own_and_published_training_cost_agree_within_half_a_percent(cost):
    f_sparse = flops_at_sparsity(cost, rigl_optax.erk(0.8)(PARAMS))
    ours = training_cost("rigl", cost.total, f_sparse, steps=32_000, end=25_000)
    papers = published_cost("rigl", cost.total, f_sparse) * 32_000
    assert ours < papers < 1.005 * ours


def test_explain_from_shapes():
    report = rigl_optax.accounting.explain(
        PARAMS,
        0.9,
        end=25_000,
        steps=32_000,
        model=forward,
        inputs=[jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)],
    )
    assert report.warnings == ()
    assert report.active == 2_550_353  # as tests/core/test_distributions.py has it
    assert report.rewirings == 250
    assert report.inference_ratio == pytest.approx(0.2418, abs=5.1e-5)
