"""The structure `measured`: blocks chosen by a table, and dense where that is quicker."""

import pytest

from rigl_optax import Block
from rigl_optax.condensed import _choice
from rigl_optax.training import config as config_lib
from rigl_optax.training import setup, sparsity


@pytest.fixture
def config(small):
    return config_lib.changed(
        small,
        {
            "model.hidden": (96, 40),
            "method.condensed": True,
            "method.structure": {"name": "measured"},
            "method.sparsity": 0.5,
        },
    )


@pytest.fixture
def table(monkeypatch):
    """Products of blocks of 16 pay from 64 units on, those of 32 do not."""
    monkeypatch.setattr(_choice, "WIDTHS", {"product": (60, 70)})
    rows = ((0.5,) * 5, (2.0,) * 5)
    monkeypatch.setattr(
        _choice, "RATIOS", {("product", 16): rows, ("product", 32): ((0.4,) * 5,) * 2}
    )


def test_layers_get_the_quickest_blocks_or_stay_dense(config, table):
    run = setup.prepare(config)
    found = run.initial.opt_state.topologies
    # 64x96 is 78 wide at the mean, 96x40 is 62, 40x10 narrower than a block.
    assert {path: t.block for path, t in found.items()} == {
        "layers/0/kernel": Block(16, 16, pad=True)
    }
    dense = sparsity.distribution(config).dense
    shapes = run.shapes["layers"]
    assert dense.reason("layers/0/kernel", shapes[0]["kernel"]) is None
    why = dense.reason("layers/1/kernel", shapes[1]["kernel"])
    assert why == "blocks would be 0.67 times as fast as dense"
    assert dense.reason("layers/2/kernel", shapes[2]["kernel"]) == "narrower than a block"
    assert dense.reason("layers/0/bias", shapes[0]["bias"]) == "fewer than two dimensions"


def test_the_masked_form_refuses_it(config):
    with pytest.raises(ValueError, match="name='measured': only with config.method.condensed=True"):
        setup.prepare(config_lib.changed(config, {"method.condensed": False}))
