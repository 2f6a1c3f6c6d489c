"""The forms of a trained network: the same outputs, files that are read back, honest tables."""

import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rigl_optax import _paths, condensed
from rigl_optax import export as export_lib
from rigl_optax.training import config as config_lib
from rigl_optax.training import deploy, setup, tasks

ROOT = pathlib.Path(__file__).parents[2]
BLOCKS = {"name": "block", "rows": 2, "cols": 2, "pad": True}
GRU = {
    "data.name": "tdavid",
    "data.sequence_length": 5,
    "model.name": "gru",
    "model.hidden": (10,),
    "model.embedding": 6,
    "model.readout": (8, 6),
    "optimizer.weight_decay": 0.0,
}


@pytest.fixture(scope="module")
def lenet(small):
    keys = {"method.sparsity": 0.9, "method.structure": BLOCKS}
    run = setup.prepare(config_lib.changed(small, keys))
    return run, run.initial, *deploy.forms(run, run.initial)


def filled(run):
    """A state whose parameters NumPy drew, few of them not zero: quicker than to compile a draw."""
    rng = np.random.default_rng(0)

    def value(x):
        drawn = rng.standard_normal(x.shape) * (rng.random(x.shape) < 0.3)
        return jnp.asarray(drawn if x.dtype == np.float32 else np.ones(x.shape), x.dtype)

    return jax.tree.map(value, run.abstract)


@pytest.fixture(scope="module")
def gru(small):
    run = setup.outline(config_lib.changed(small, GRU), tasks.Facts())
    state = filled(run)
    return run, state, *deploy.forms(run, state)


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(deploy, "_TURN", 0.0)
    monkeypatch.setattr(deploy, "_ROUNDS", 1)
    monkeypatch.setattr(deploy, "BATCHES", (1, 3))


def images(number):
    return jnp.asarray(np.random.default_rng(0).random((number, 8, 8)), jnp.float32)


def test_all_forms_give_the_same(lenet):
    run, _, found, missing = lenet
    assert list(found) == ["dense", "compacted", "blocks", "csr"] and not missing
    kernel = found["blocks"].model.layers[0].kernel.get_value()
    assert isinstance(kernel, condensed.BlockSparse)
    outputs = {name: form.model(images(4)) for name, form in found.items()}
    for name in outputs:
        np.testing.assert_allclose(outputs[name], outputs["dense"], atol=1e-5)
    dense, small = (nnx.state(found[name].model, nnx.Param) for name in ("dense", "compacted"))
    assert sum(x.size for x in jax.tree.leaves(small)) < sum(x.size for x in jax.tree.leaves(dense))


def test_files_hold_the_network(lenet, tmp_path, quick):
    run, state, found, missing = lenet
    deploy.write(tmp_path, run, state, found)
    sparse = export_lib.read(tmp_path / "sparse.safetensors")
    dense = export_lib.read(tmp_path / "dense.safetensors")
    for (path, x), (_, y) in zip(
        *map(_paths.flatten_with_paths, (sparse.params, dense.params)), strict=True
    ):
        np.testing.assert_array_equal(x, y, err_msg=path)
    assert sparse.masks and not dense.masks
    compacted = export_lib.read(tmp_path / "compacted.safetensors")
    shapes = [tuple(layer.kernel.shape) for layer in found["compacted"].model.layers]
    assert [compacted.params["layers"][str(i)]["kernel"].shape for i in range(3)] == shapes
    expected = found["dense"].model(images(3))
    for name in ("dense", "compacted"):
        program = jax.export.deserialize(bytearray((tmp_path / f"{name}.jaxexport").read_bytes()))
        assert program.platforms == deploy.PLATFORMS
        for number in (1, 3):
            logits = program.call(images(3)[:number])
            np.testing.assert_allclose(logits, expected[:number], atol=1e-5)
    measured = deploy.measure(tmp_path, run, state, found, run.dataset.validation)
    assert len({m.accuracy for m in measured.values()}) == 1
    size = (tmp_path / "compacted.safetensors").stat().st_size
    assert measured["compacted"].disk == measured["csr"].disk == size < measured["dense"].disk
    assert measured["compacted"].memory < measured["dense"].memory
    assert all(m.latency > 0 and list(m.throughput) == [3] for m in measured.values())
    deploy.record(tmp_path, measured)
    kept = json.loads((tmp_path / "forms.json").read_text())
    assert kept["fastest"].keys() == {"1", "3"} and kept["forms"].keys() == found.keys()
    assert "| compacted |" in deploy.table(measured, missing)


def test_a_recurrent_artifact_takes_and_gives_its_state(gru, tmp_path):
    run, state, found, missing = gru
    assert list(found) == ["dense", "compacted"]
    assert missing == {
        "blocks": "no layer is sparse",
        "csr": "single weights cannot be stored in recurrent layers",
    }
    model = found["compacted"].model
    program = jax.export.deserialize(bytearray(deploy.artifact(run, model)))
    rng = np.random.default_rng(0)
    width = model.carry[0].shape[1]
    carry, lanes = [jnp.zeros((2, width))], 2
    graphdef, params, rest = deploy._split(found["dense"].model)
    rest = jax.tree.map(lambda x: jnp.zeros((lanes, x.shape[1])), rest)
    streaming = nnx.merge(graphdef, params, rest)
    for _ in range(2):
        tokens = jnp.asarray(rng.integers(0, 256, (lanes, 5)), jnp.uint8)
        resets = jnp.zeros((lanes, 5), bool)
        logits, carry = program.call(carry, tokens, resets)
        np.testing.assert_allclose(logits, streaming(tokens, resets), atol=1e-4)


def test_a_transformer_is_exported(small):
    keys = {k: v for k, v in GRU.items() if k.split(".")[1] not in ("readout", "hidden")}
    keys |= {"model.name": "gpt", "model.hidden": (), "model.embedding": 8, "model.depth": 1}
    run = setup.outline(config_lib.changed(small, keys | {"model.heads": 2}), tasks.Facts())
    state = filled(run)
    model = nnx.merge(run.graphdef, state.params, state.model_state)
    program = jax.export.deserialize(bytearray(deploy.artifact(run, model)))
    tokens = jnp.arange(10, dtype=jnp.uint8).reshape(2, 5)
    logits = jax.jit(lambda x: model(x))(tokens)
    np.testing.assert_allclose(program.call(tokens), logits, atol=1e-5)


def measured(latency, accuracy=0.9):
    return deploy.Measured(100, 100, accuracy, latency, {b: b / latency for b in (8, 64, 256)})


def test_the_table_says_when_dense_wins_and_when_accuracy_differs():
    found = {"dense": measured(0.1), "compacted": measured(0.2)}
    assert set(deploy.fastest(found).values()) == {"dense"}
    text = deploy.table(found, {"csr": "no linear layer is sparse"})
    assert "dense is the fastest at batches of 1, 8, 64, 256" in text
    assert text.endswith("no csr: no linear layer is sparse") and "NOT" not in text
    found["csr"] = measured(0.01, accuracy=0.8)
    assert set(deploy.fastest(found).values()) == {"dense"}
    assert "NOT the accuracy of dense: csr" in deploy.table(found, {})


@pytest.mark.slow
def test_the_script_writes_and_measures(trained_vision, tmp_path):
    out = tmp_path / "export"
    command = [sys.executable, "scripts/export.py", f"--workdir={trained_vision.workdir}"]
    done = subprocess.run(
        [*command, f"--out={out}"], check=True, capture_output=True, text=True, cwd=ROOT
    )
    assert f"{100 * trained_vision.result['test']['accuracy']:.2f} %" in done.stdout
    assert "| dense |" in done.stdout and "fastest: " in done.stdout
    assert {path.name for path in out.iterdir()} == {
        *(f"{name}.safetensors" for name in ("sparse", "dense", "compacted")),
        *("dense.jaxexport", "compacted.jaxexport", "forms.json"),
    }
