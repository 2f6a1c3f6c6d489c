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
from rigl_optax.training import deploy, setup, sparsity, tasks

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


GPT = {
    "data.name": "tdavid",
    "data.sequence_length": 5,
    "model.name": "gpt",
    "model.hidden": (),
    "model.embedding": 8,
    "model.depth": 1,
    "model.heads": 2,
    "optimizer.weight_decay": 0.0,
}


@pytest.fixture(scope="module")
def lenet(small):
    keys = {"method.sparsity": 0.9, "method.structure": BLOCKS}
    run = setup.prepare(config_lib.changed(small, keys))
    return run, run.initial, *deploy.forms(run, run.initial)


def drawn(run):
    """A state whose masks and parameters NumPy drew: quicker than to compile a draw."""
    rng = np.random.default_rng(0)
    sparse = sparsity.distribution(run.config)(run.shapes)

    def values(x):
        filled = rng.random(x.shape) if x.dtype == np.float32 else np.ones(x.shape)
        return jnp.asarray(filled, x.dtype)

    def mask(path, x):
        return jnp.asarray(rng.random(x.shape) < (0.2 if path in sparse else 1.0))

    state = jax.tree.map(values, run.abstract)
    masks = _paths.map_with_names(mask, run.shapes)
    params = jax.tree.map(lambda m, x: jnp.where(m, x - 0.5, 0), masks, state.params)
    return state._replace(params=params, opt_state=state.opt_state._replace(masks=masks))


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    (folder / "a.txt").write_bytes(bytes(range(32, 127)) * 30)
    keys = {"data.name": "text", "data.dir": str(folder), "data.sequence_length": 5}
    return keys | {"batch_size": 4, "eval.batch_size": 4}


@pytest.fixture(scope="module")
def gru(small, texts):
    run = setup.prepare(config_lib.changed(small, GRU | texts))
    state = drawn(run)
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
    outputs["jit"] = nnx.jit(lambda model, x: model(x))(found["csr"].model, images(4))
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
    assert "| compacted |" in deploy.table(measured)
    assert all(m.difference < 1e-5 for m in measured.values())
    assert measured["dense"].difference == 0 < measured["compacted"].difference


def check_forms(run, state, found, folder, monkeypatch):
    """All forms give the same, on the whole validation split too."""
    monkeypatch.setattr(deploy, "artifact", lambda *_: b"")  # other tests make them
    deploy.write(folder, run, state, found)
    measured = deploy.measure(folder, run, state, found, run.dataset.validation)
    assert len({m.accuracy for m in measured.values()}) == 1
    assert all(m.difference < 1e-5 for m in measured.values())
    assert measured["compacted"].disk < measured["dense"].disk
    return measured


def kinds_of(form):
    params = nnx.to_pure_dict(nnx.state(form.model, nnx.Param))
    named = jax.tree_util.tree_leaves_with_path(
        params, is_leaf=lambda x: isinstance(x, condensed.CSR)
    )
    return {jax.tree_util.keystr(p, simple=True, separator="/"): type(x) for p, x in named}


def test_a_recurrent_network_in_all_its_forms(gru, tmp_path, quick, monkeypatch):
    run, state, found, missing = gru
    assert list(found) == ["dense", "compacted", "csr"]
    assert missing == {"blocks": "it was not trained with blocks"}
    single = {path for path, kind in kinds_of(found["csr"]).items() if kind is condensed.CSR}
    assert single == {
        *("layers/0/input/kernel", "layers/0/recurrent/kernel"),
        *("readout/0/kernel", "readout/1/kernel"),
    }
    assert found["csr"].kept_dense == ()
    check_forms(run, state, found, tmp_path, monkeypatch)


def test_a_transformer_in_all_its_forms(small, texts, tmp_path, quick, monkeypatch):
    run = setup.prepare(config_lib.changed(small, GPT | texts))
    state = drawn(run)
    found, missing = deploy.forms(run, state)
    assert list(found) == ["dense", "compacted", "csr"] and set(missing) == {"blocks"}
    assert found["csr"].kept_dense == ()
    check_forms(run, state, found, tmp_path, monkeypatch)
    with_scan = config_lib.changed(run.config, {"model.scan": True})
    stacked = setup.outline(with_scan, tasks.Facts())
    found, missing = deploy.forms(stacked, drawn(stacked))
    assert list(found) == ["dense"] and "compact a model with scan=False" in missing["compacted"]
    assert missing["csr"] == "no linear or recurrent layer is sparse"


def test_convolutions_stay_dense_and_are_named(vision, tmp_path, quick, monkeypatch):
    run = setup.prepare(config_lib.changed(vision, {"model.dense_layers": "stem"}))
    state = drawn(run)
    found, missing = deploy.forms(run, state)
    assert list(found) == ["dense", "compacted", "csr"]
    single = [path for path, kind in kinds_of(found["csr"]).items() if kind is condensed.CSR]
    assert single == ["classifier/kernel"]
    assert len(found["csr"].kept_dense) > 5 and "classifier/kernel" not in found["csr"].kept_dense
    check_forms(run, state, found, tmp_path, monkeypatch)
    text = deploy.hand_over(run, state, tmp_path / "more", measures=False)
    assert f"wrote {tmp_path / 'more' / 'compacted.safetensors'} (" in text
    assert "csr: these sparse kernels stay dense arrays: " in text and "no blocks: " in text
    assert not (tmp_path / "more" / "forms.json").exists()


def test_a_recurrent_artifact_takes_and_gives_its_state(gru, tmp_path):
    run, state, found, missing = gru
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
    run = setup.outline(config_lib.changed(small, GPT), tasks.Facts())
    state = drawn(run)
    model = nnx.merge(run.graphdef, state.params, state.model_state)
    program = jax.export.deserialize(bytearray(deploy.artifact(run, model)))
    tokens = jnp.arange(10, dtype=jnp.uint8).reshape(2, 5)
    logits = jax.jit(lambda x: model(x))(tokens)
    np.testing.assert_allclose(program.call(tokens), logits, atol=1e-5)


def test_programs_of_tokens_take_all_their_numbers(small):
    config = config_lib.changed(small, GPT | {"data.name": "tokens", "model.vocabulary": 300})
    run = setup.outline(config, tasks.Facts())
    program = jax.export.deserialize(
        bytearray(deploy.artifact(run, deploy._model(run.graphdef, *_arrays(run)), ["cpu"]))
    )
    assert program.in_avals[0].dtype == np.uint16


def _arrays(run):
    state = drawn(run)
    return state.params, state.model_state


def measured(latency, accuracy=0.9):
    throughput = {b: b / latency for b in (8, 64, 256)}
    return deploy.Measured(100, 100, accuracy, 0.0, latency, throughput)


def test_the_table_says_when_dense_wins_and_when_accuracy_differs():
    found = {"dense": measured(0.1), "compacted": measured(0.2)}
    assert set(deploy.fastest(found).values()) == {"dense"}
    text = deploy.table(found)
    assert "dense is the fastest at batches of 1, 8, 64, 256" in text and "NOT" not in text
    found["csr"] = measured(0.01, accuracy=0.8)
    assert set(deploy.fastest(found).values()) == {"dense"}
    assert "NOT the accuracy of dense: csr" in deploy.table(found)


@pytest.mark.slow
def test_the_script_writes_and_measures(trained_vision, tmp_path):
    out = tmp_path / "export"
    command = [sys.executable, "scripts/export.py", f"--workdir={trained_vision.workdir}"]
    command += [f"--out={out}", "--measure"]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
    assert f"{100 * trained_vision.result['test']['accuracy']:.2f} %" in done.stdout
    assert "| dense |" in done.stdout and "fastest: " in done.stdout
    assert {path.name for path in out.iterdir()} == {
        *(f"{name}.safetensors" for name in ("sparse", "dense", "compacted")),
        *("dense.jaxexport", "compacted.jaxexport", "forms.json"),
    }
