"""What a condensed run leaves behind: checkpoints, exports, pages, masks for others."""

import pathlib
import re
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from rigl_optax.data import batches
from rigl_optax.reports import page, page_figures
from rigl_optax.training import (
    checkpoints,
    export,
    metrics,
    sampling,
    setup,
)
from rigl_optax.training import config as config_lib
from tests.training import condensed_runs as runs
from tests.training.condensed_runs import GRU, LENET

pytestmark = pytest.mark.usefixtures("shared_programs")

needs_eight = pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
slow = pytest.mark.slow
ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """An uninterrupted run: workdir and result."""
    workdir = tmp_path_factory.mktemp("finished")
    return workdir, runs.train(LENET, workdir)[0]


class Stopped(Exception):
    pass


@pytest.mark.parametrize("stop_at", [5, 20, 21, 31])  # rewirings at 0, 10, 20; checkpoints at 20
def test_stopped_anywhere_and_started_again_it_ends_bit_for_bit_the_same(
    finished, tmp_path, monkeypatch, stop_at
):
    real = batches.training_batch

    def stopping(*args, step, **keys):
        if step == stop_at - 1:
            raise Stopped
        return real(*args, step=step, **keys)

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(batches, "training_batch", stopping)
        runs.train(LENET, tmp_path)
    again, printed = runs.train(LENET, tmp_path)
    assert ("resumed at step 20" in printed) == (stop_at > 20)
    ends = [runs.final(LENET, workdir) for workdir in (tmp_path, finished[0])]
    assert jax.tree.structure(ends[0]) == jax.tree.structure(ends[1])
    for a, b in zip(*map(jax.tree.leaves, ends), strict=True):
        np.testing.assert_array_equal(a, b)
    for key in ("test", "validation", "active_weights", "coverage", "fingerprints", "flops"):
        assert again[key] == finished[1][key]
    records = [metrics.read(workdir / metrics.FILE) for workdir in (tmp_path, finished[0])]
    assert records[0] == records[1]


@needs_eight
@pytest.mark.parametrize("devices", [pytest.param(4, marks=slow), 8])
def test_a_checkpoint_goes_onto_another_number_of_devices(tmp_path, devices):
    config = config_lib.changed(LENET, {"batch_size": 48, "checkpoint.keep": 5})
    whole, _ = runs.train(config, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    shutil.rmtree(tmp_path / "parts" / "checkpoints" / "40")
    across = config_lib.changed(config, {"mesh.data": devices})
    result, printed = runs.train(across, tmp_path / "parts")
    assert "resumed at step 20 of 40" in printed
    for key in ("fingerprints", "active_weights", "coverage", "flops", "warnings"):
        assert result[key] == whole[key]
    ends = [runs.final(config, tmp_path / name) for name in ("parts", "whole")]
    runs.assert_same_masks(*ends)
    runs.assert_close(*ends, rtol=1e-3, atol=1e-5)  # sums over the batch in another order


@pytest.mark.parametrize("was", [True, pytest.param(False, marks=slow)])
def test_a_run_of_the_other_form_is_refused_by_the_name_of_the_key(finished, tmp_path, was):
    first = config_lib.changed(LENET, {"method.condensed": was, "steps": 10})
    workdir = tmp_path
    runs.train(first, workdir)
    other = config_lib.changed(first, {"method.condensed": not was})
    for config_file in ("there", "deleted"):  # a checkpoint knows it itself
        if config_file == "deleted":
            (workdir / checkpoints.CONFIG_FILE).unlink()
        with pytest.raises(ValueError, match=f"condensed: {was} -> {not was}"):
            runs.train(other, workdir)


# ------------------------------------------------------------------------ for people and others


def test_an_export_is_the_dense_network_and_its_masks(finished, tmp_path):
    workdir, result = finished
    run, end = setup.prepare(LENET), runs.final(LENET, workdir)
    export.write(tmp_path / "network.safetensors", run, end)
    found = export.read(tmp_path / "network.safetensors")
    assert config_lib.from_mapping(found.config) == LENET
    weights, masks = runs.named(found.params), runs.named(found.masks)
    assert masks.keys() == end.opt_state.topologies.keys()
    expected, whole = runs.dense_of(end), runs.masks_of(end)
    assert weights.keys() == expected.keys()
    for path, leaf in expected.items():
        np.testing.assert_array_equal(weights[path], leaf)
        assert weights[path].shape == whole[path].shape
    for path, mask in masks.items():
        np.testing.assert_array_equal(mask, whole[path])
        assert mask.sum() == result["active_weights"][path]
        assert not weights[path][~mask].any()
    # Whoever deploys it needs nothing of ours.
    images = np.asarray(run.dataset.test.images, np.float32).reshape(-1, 64) / 16
    for i in range(3):
        layer = found.params["layers"][str(i)]
        images = np.maximum(images, 0) @ layer["kernel"] + layer["bias"]
    right = (images.argmax(1) == run.dataset.test.labels).mean()
    assert right == pytest.approx(result["test"]["accuracy"])


def test_its_page_shows_the_masks_of_weights(finished):
    text = page.render(finished[0])
    assert re.findall(r'<figure id="([\w-]+)"><svg', text)[-2:] == ["mask", "pixels"]
    figures = page_figures.masks(finished[0], LENET)
    assert "Now: the checkpoint of step 40." in figures[0].note
    first = page_figures._masks(run := setup.prepare(LENET), run.initial)
    assert {p: m.shape for p, m in first.items() if not m.all()} == {
        "layers/0/kernel": (64, 20),
        "layers/1/kernel": (20, 10),
    }


@pytest.mark.parametrize("mesh", [{}, pytest.param({"mesh.params": 5}, marks=[slow, needs_eight])])
def test_its_masks_are_a_ticket(finished, tmp_path, mesh):
    config = config_lib.changed(
        runs.masked(LENET),
        {"method.name": "lottery", "method.ticket": str(finished[0]), "steps": 10, **mesh},
    )
    ticket = runs.final(LENET, finished[0])
    runs.assert_same_masks(setup.prepare(config).initial, ticket)
    result, _ = runs.train(config, tmp_path)
    assert result["active_weights"] == finished[1]["active_weights"]
    assert result["flops"]["training"] > finished[1]["flops"]["training"]
    runs.assert_same_masks(runs.final(config, tmp_path), ticket)


@slow
def test_the_scripts_read_it(tmp_path):
    result, _ = runs.train(GRU, tmp_path)

    def told(script, *flags):
        command = [sys.executable, f"scripts/{script}.py", f"--workdir={tmp_path}", *flags]
        return subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout

    printed = told("evaluate", f"--export={tmp_path / 'gru.safetensors'}")
    assert f"bits per byte {result['test']['bits_per_byte']:.3f}" in printed
    assert export.read(tmp_path / "gru.safetensors").config["method"]["condensed"] is True
    run, end = setup.prepare(GRU), runs.final(GRU, tmp_path)
    drawn = sampling.sample(run, end, 20, prompt=b"the ", temperature=0, seed=0)
    flags = ("--length=20", "--prompt=the ", "--temperature=0")
    assert told("sample", *flags) == f"the {drawn.decode(errors='replace')}\n"
    told("report")
    assert (tmp_path / "report.html").stat().st_size > 10_000
