"""The structure `measured`: blocks chosen by a table, and dense where that is quicker."""

import re

import pytest

from rigl_optax import Block
from rigl_optax.condensed import _choice
from rigl_optax.training import config as config_lib
from rigl_optax.training import costs, setup, sparsity


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


@pytest.mark.parametrize("kind", ["gpt", "vit"])
def test_what_a_transformer_gains_is_told_before_it_trains(small, table, kind):
    sizes = {"depth": 1, "heads": 2, "embedding": 40}
    changes = {
        "gpt": {"data.name": "topics", "data.sequence_length": 8, "model": {"name": "gpt"} | sizes},
        "vit": {"model": {"name": "vit", "patch": 4, "hidden": ()} | sizes},
    }
    condensed = {"method.condensed": True, "method.structure": {"name": "measured"}}
    run = setup.prepare(
        config_lib.changed(small, changes[kind] | condensed | {"method.sparsity": 0.5})
    )
    # 40x160 is 80 wide at the mean, 40x120 69, 40x40 narrower than the table.
    gains = (("attention/qkv", 24, 1.8), ("mlp/down", 30, 2.0), ("mlp/up", 30, 2.0))
    lines = run.representation.storage(run.initial)
    for line, (layer, blocks, ratio) in zip(lines, gains, strict=True):
        stored = rf"\d+ of {blocks} blocks of 16x16 stored; about {ratio} times as fast as dense"
        assert re.fullmatch(f"blocks/0/{layer}/kernel: {stored}", line)
    explained = {layer.path: layer.dense_because for layer in costs.explain(run).layers}
    why = explained["blocks/0/attention/out/kernel"]
    assert why == "blocks would be 0.5 times as fast as dense"


def test_the_masked_form_refuses_it(config):
    with pytest.raises(ValueError, match="name='measured': only with config.method.condensed=True"):
        setup.prepare(config_lib.changed(config, {"method.condensed": False}))
