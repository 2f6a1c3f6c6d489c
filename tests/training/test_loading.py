"""Runs restored from their workdirs alone."""

import io
import os
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from rich.console import Console

from rigl_optax import training
from rigl_optax.data import digits
from rigl_optax.training import (
    checkpoints,
    evaluation,
    export,
    loading,
    loop,
    sampling,
    setup,
    tasks,
)
from rigl_optax.training import config as config_lib
from rigl_optax.training.mesh import Placement
from tests.training import condensed_runs as runs


def train(config, workdir):
    return loop.train(config, workdir, Console(file=io.StringIO(), width=120))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, small):
    workdir = tmp_path_factory.mktemp("finished")
    return workdir, train(small, workdir)


@pytest.fixture
def without_data_and_weights(monkeypatch):
    """Reading the dataset, or making initial weights, fails."""

    def fail(*args, **keys):
        raise AssertionError("not from shapes alone")

    monkeypatch.setitem(tasks.IMAGES, "digits", fail)
    monkeypatch.setattr(Placement, "maker", fail)


@pytest.mark.usefixtures("without_data_and_weights")
def test_a_run_is_restored_from_shapes_alone(finished, tmp_path, small):
    workdir, result = finished
    run, state = training.load(workdir)
    assert int(state.step) == small.steps and run.config == small
    active = sum(result["active_weights"].values())
    kept = sum(int(m.sum()) for m in jax.tree.leaves(run.representation.masks(state)))
    assert kept == active
    export.write(tmp_path / "network.safetensors", run, state)
    found = export.read(tmp_path / "network.safetensors")
    assert config_lib.from_mapping(found.config) == small
    assert int(training.load(str(workdir), 40)[1].step) == 40
    with pytest.raises(ValueError, match="step=7: must be newest"):
        training.load(workdir, 7)


def test_the_data_are_read_when_they_are_first_asked_for(finished, monkeypatch):
    workdir, result = finished
    calls = []
    monkeypatch.setitem(
        tasks.IMAGES, "digits", lambda *args: calls.append(args) or digits.load(*args)
    )
    run, state = training.load(workdir)
    assert calls == []
    assert evaluation.evaluator(run)(state, run.dataset.test) == result["test"]
    assert run.dataset is run.dataset and len(calls) == 1


@pytest.mark.parametrize("name", ["snip", "small_dense", "top_kast"])
def test_what_is_restored_is_what_was_saved(small, tmp_path, name):
    config = config_lib.changed(small, {"method.name": name, "steps": 10})
    train(config, tmp_path)
    prepared = setup.prepare(config)
    with checkpoints.read_checkpoints(tmp_path) as saved:
        expected = checkpoints.restore_newest(saved, prepared.abstract, print)
    run, state = training.load(tmp_path)
    assert jax.tree.structure(state) == jax.tree.structure(expected)
    for a, b in zip(*map(jax.tree.leaves, (state, expected)), strict=True):
        assert a.dtype == b.dtype and a.sharding == b.sharding
        np.testing.assert_array_equal(a, b)
    # The first masks of `snip` come from data: they are the right ones all the same.
    for a, b in zip(*map(jax.tree.leaves, (run.draw(), prepared.initial)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_lottery_run_is_restored_without_its_ticket(small, tmp_path):
    train(config_lib.changed(small, {"steps": 10}), tmp_path / "first")
    keys = {"method.name": "lottery_rigl", "method.ticket": str(tmp_path / "first")}
    config = config_lib.changed(small, keys | {"method.accumulate": 2, "steps": 10})
    train(config, tmp_path / "second")
    shutil.rmtree(tmp_path / "first")
    assert int(training.load(tmp_path / "second")[1].step) == 10


def test_a_condensed_run_and_its_text_are_restored_without_the_text(tmp_path, monkeypatch):
    config = config_lib.changed(runs.GRU, {"steps": 8})
    train(config, tmp_path)

    def fail(*args):
        raise FileNotFoundError("the text is gone")

    monkeypatch.setitem(tasks.TEXTS, "topics", fail)
    run, state = training.load(tmp_path)
    drawn = sampling.sample(run, state, 5, prompt=b"the ", temperature=0, seed=0)
    assert len(drawn) == 5
    with pytest.raises(FileNotFoundError, match="the text is gone"):
        run.dataset.test  # noqa: B018 - that it is read is what is tested


def test_text_is_sampled_by_the_script_where_the_text_is_gone(tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    (folder / "a.txt").write_bytes(b"the quick brown fox jumps over the lazy dog. " * 60)
    (folder / "b.txt").write_bytes(b"pack my box with five dozen liquor jugs. " * 60)
    config = config_lib.changed(
        runs.masked(runs.GRU),
        {"data.name": "text", "data.dir": str(folder), "steps": 8, "method.structure": {}},
    )
    train(config, tmp_path / "run")
    shutil.rmtree(folder)
    command = [sys.executable, "scripts/sample.py", f"--workdir={tmp_path / 'run'}", "--length=9"]
    found = subprocess.run(
        [*command, "--prompt=the ", "--temperature=0"],
        capture_output=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        check=False,
    )
    assert found.returncode == 0, found.stderr.decode()
    assert found.stdout.startswith(b"the ")


@pytest.mark.parametrize("content", [None, "", "{}", '{"classes": 10}', "[1]"])
def test_without_the_facts_of_its_data_there_is_one_clear_error(finished, tmp_path, content):
    shutil.copytree(finished[0], tmp_path / "run")
    path = tmp_path / "run" / loading.FACTS_FILE
    path.unlink()
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=r"dataset.json: not the facts of a dataset"):
        training.load(tmp_path / "run")
