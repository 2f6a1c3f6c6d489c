"""The table in docs/accounting.md says what the library computes."""

import pathlib

import jax
import jax.numpy as jnp
import pytest

import rigl_optax
from rigl_optax import accounting
from tests.accounting import published
from tests.accounting.test_resnet50 import PARAMS, forward

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "accounting.md"
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in PAGE.read_text().splitlines()
    if line.startswith(("| ERK |", "| uniform"))
]


def test_table():
    cost = accounting.count_flops(
        forward, PARAMS, jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    )
    layers = published.resnet50()
    kernels = {x.name: jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in layers}
    dense = published.published_flops(layers)
    assert len(ROWS) == 10
    for kind, sparsity, *figures in ROWS:
        make = rigl_optax.erk if kind == "ERK" else rigl_optax.uniform
        overrides = {} if kind == "ERK" else {"conv1": 0.0}
        distribution = make(float(sparsity), dense=lambda p, x: False, overrides=overrides)
        ours = accounting.flops_at_sparsity(cost, distribution(PARAMS))
        theirs = published.published_flops(layers, distribution(kernels))
        training = accounting.training_cost("rigl", cost.total, ours, steps=32_000, end=25_000)
        assert [float(x) for x in figures] == pytest.approx(
            [
                ours / cost.total,
                theirs / dense,
                training / (3 * cost.total * 32_000),
                accounting.published_cost("rigl", dense, theirs) / (3 * dense),
            ],
            abs=5.1e-5,
        )
