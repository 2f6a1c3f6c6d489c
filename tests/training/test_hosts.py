"""One run on one device, on eight, and on two real processes of four: the same answer."""

import io
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time
import types

import jax
import numpy as np
import pytest
from rich.console import Console

from rigl_optax.training import checkpoints, hosts, loop, metrics, setup, signals
from rigl_optax.training import config as config_lib
from tests.training.condensed_runs import LENET
from tests.training.spoiled_host import AT, CONFIG

ROOT = pathlib.Path(__file__).parents[2]


def free_port():
    with socket.socket() as listening:
        listening.bind(("localhost", 0))
        return listening.getsockname()[1]


def together(commands, devices, meanwhile=None):
    """Runs processes at the same time; of each its exit code, standard output and error.

    `meanwhile` is called with them once they are started.
    """
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
    }
    started = [
        subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for command in commands
    ]
    try:
        if meanwhile is not None:
            meanwhile(started)
        return [(p.communicate(timeout=240), p.returncode)[::-1] for p in started]
    finally:
        for process in started:
            process.kill()


def on_two_processes(config, workdir, devices=4, meanwhile=None):
    """`scripts/train.py` twice, four devices each."""
    port = free_port()
    keys = config_lib.flat(config_lib.to_json(config))
    keys |= {"model.hidden": ",".join(map(str, config.model.hidden))}
    overrides = [f"--config.{key}={value}" for key, value in keys.items()]
    return together(
        [
            [
                *("scripts/train.py", "--config=configs/digits_lenet.py", f"--workdir={workdir}"),
                *(f"--coordinator=localhost:{port}", "--num_processes=2", f"--process_id={i}"),
                *overrides,
            ]
            for i in range(2)
        ],
        devices=devices,
        meanwhile=meanwhile,
    )


def on_this_process(config, workdir):
    loop.train(config, workdir, Console(file=io.StringIO(), width=120))


MESHES = {
    "1x1": {},
    "8x1": {"mesh.data": 8},
    "1x8 explicit": {"mesh.params": 8, "mesh.axes": "explicit"},
    "two processes": {"mesh.data": 0, "mesh.params": 4},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Of the same run on each mesh: workdir, and the final state brought to one device."""
    found = {}
    for name, keys in MESHES.items():
        config = config_lib.changed(CONFIG, {"mesh.data": 1} | keys)
        workdir = tmp_path_factory.mktemp(name.replace(" ", "_"))
        if name == "two processes":
            said = on_two_processes(config, workdir)
            assert [code for code, _ in said] == [0, 0], said
        else:
            on_this_process(config, workdir)
            said = None
        here = config_lib.changed(CONFIG, {"mesh.data": 1})
        with checkpoints.read_checkpoints(workdir) as saved:
            state = checkpoints.restore_newest(saved, setup.prepare(here).abstract, print)
        found[name] = (workdir, jax.device_get(state), said)
    return found


def result_of(workdir):
    return json.loads((workdir / checkpoints.RESULT_FILE).read_text())


@pytest.mark.exact
@pytest.mark.slow
@pytest.mark.parametrize("name", list(MESHES)[1:])
def test_masks_and_integers_are_the_same_on_every_mesh(runs, name):
    expected_dir, expected, _ = runs["1x1"]
    workdir, state, _ = runs[name]
    assert state.step == 60
    for found, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        if found.dtype == bool or np.issubdtype(found.dtype, np.integer):
            np.testing.assert_array_equal(found, wanted)
        else:  # sums over the batch are added up in another order
            np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-6)
    results = [result_of(path) for path in (workdir, expected_dir)]
    for key in ("fingerprints", "active_weights", "weights", "flops", "warnings"):
        assert results[0][key] == results[1][key]
    assert results[0]["test"]["accuracy"] == results[1]["test"]["accuracy"]
    assert len(results[0]["devices"]) == 8


@pytest.mark.exact
@pytest.mark.slow
def test_where_sums_are_added_up_in_one_order_all_is_the_same_bit_for_bit(runs):
    """However the state lies: the batch is spread over the same eight devices of one process."""
    pair = (jax.tree.leaves(runs[name][1]) for name in ("8x1", "1x8 explicit"))
    for found, wanted in zip(*pair, strict=True):
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.exact
@pytest.mark.slow
def test_what_is_logged_is_the_same_on_every_mesh(runs):
    first = None
    for workdir, _, _ in runs.values():
        records = metrics.read(workdir / metrics.FILE)
        counted = [
            {
                k: v for k, v in r.items() if not re.search("loss", k)
            }  # the rest are ratios of counts
            for r in records
        ]
        losses = [r["loss"] for r in records if "loss" in r]
        first = first or (counted, losses)
        assert counted == first[0]
        np.testing.assert_allclose(losses, first[1], rtol=1e-5)


@pytest.mark.exact
@pytest.mark.slow
def test_only_the_first_process_prints_and_writes(runs):
    workdir, _, said = runs["two processes"]
    (_, (first, _)), (_, (second, _)) = said
    # Gloo greets from several threads at once, so its line may be cut and mixed anywhere.
    greeting = (
        r"\[Gloo\]|Rank|is connected to|peer ranks\.?|Expected number of connected|is :|\d|\s"
    )
    assert "test accuracy" in first and re.sub(greeting, "", second) == ""
    records = metrics.read(workdir / metrics.FILE)
    assert [r["step"] for r in records if r["kind"] == "validation"] == [20, 40, 60]
    config = config_lib.from_mapping(checkpoints.read_config(workdir))
    assert config.mesh.params == 4


@pytest.mark.slow
def test_a_condensed_run_on_two_processes_is_that_on_one(tmp_path):
    config = config_lib.changed(
        LENET, {"batch_size": 48, "mesh.data": 0, "faults.compare_at_rewirings": True}
    )
    said = on_two_processes(config, tmp_path / "two", devices=2)
    assert [code for code, _ in said] == [0, 0], said
    on_this_process(config_lib.changed(config, {"mesh.data": 1}), tmp_path / "one")
    two, one = (result_of(tmp_path / name) for name in ("two", "one"))
    assert len(two["devices"]) == 4
    for name in ("fingerprints", "active_weights", "coverage", "flops", "warnings"):
        assert two[name] == one[name]
    assert two["test"]["loss"] == pytest.approx(one["test"]["loss"], rel=1e-4)


@pytest.mark.slow
def test_when_one_process_is_asked_to_stop_all_save_the_same_step_and_stop(tmp_path):
    config = config_lib.changed(
        CONFIG,
        {"mesh.data": 0, "mesh.params": 1, "steps": 600, "checkpoint.every": 0, "log.every": 10},
    )

    def ask_the_second(started):
        while not (tmp_path / "asked" / metrics.FILE).exists():
            assert started[1].poll() is None
            time.sleep(0.05)
        started[1].send_signal(signal.SIGTERM)

    said = on_two_processes(config, tmp_path / "asked", 1, ask_the_second)
    assert [code for code, _ in said] == [signals.STOPPED] * 2, said
    with checkpoints.read_checkpoints(tmp_path / "asked") as saved:
        (stopped,) = (checkpoint.step for checkpoint in saved.checkpoints)
    assert 0 < stopped < 600
    assert f"asked to stop: saved at step {stopped} of 600" in "".join(said[0][1])
    here = config_lib.changed(config, {"mesh.data": 1})
    on_this_process(here, tmp_path / "asked")  # goes on, alone
    on_this_process(here, tmp_path / "whole")
    for name in ("fingerprints", "active_weights", "coverage"):
        assert result_of(tmp_path / "asked")[name] == result_of(tmp_path / "whole")[name]


@pytest.mark.slow
@pytest.mark.parametrize("what", ["flip", "raise"])
def test_what_goes_wrong_on_one_process_ends_both(tmp_path, what):
    port = free_port()
    module = ["-m", "tests.training.spoiled_host", what, f"localhost:{port}"]
    said = together([[*module, str(i), str(tmp_path)] for i in range(2)], devices=1)
    codes = [code for code, _ in said]
    errors = [error for _, (_, error) in said]
    if what == "flip":
        # Found at the rewiring after it, before the checkpoint at 40, on whichever process
        # comes to tell first; the other may hear of that before it has found it itself.
        assert 1 in codes and set(codes) <= {1, hosts.LOST, -signal.SIGABRT}, said
        assert any("the mask of 'layers/1/kernel' is not the same everywhere" in e for e in errors)
        assert any("(process 0)" in e and "(process 1)" in e for e in errors)
    else:
        assert codes == [hosts.LOST, 1], said
        assert "a disk of process 1 is broken" in errors[1]
        assert "process 0 of 2: lost contact with process 1 (" in errors[0]
        assert "Traceback" not in errors[0]
    steps = sorted(int(p.name) for p in (tmp_path / "checkpoints").glob("[0-9]*"))
    assert steps == [20] and AT > 20
    assert not (tmp_path / checkpoints.RESULT_FILE).exists()


APART = """
import pathlib, sys
from rigl_optax.training import hosts, mesh
from tests.training.conftest import SMALL
hosts.join(sys.argv[1], 2, int(sys.argv[2]))
with hosts.failing_together():
    assert hosts.first_tells(lambda: {"a": [1.5, "x"] * 20}) == {"a": [1.5, "x"] * 20}
    hosts.check_shared(pathlib.Path(sys.argv[3]))
    print("shared", flush=True)
    hosts.check_shared(pathlib.Path(sys.argv[4]))
"""


@pytest.mark.slow
def test_a_workdir_that_is_not_shared_is_found_at_once(tmp_path):
    port = free_port()
    for name in ("both", "own0", "own1"):
        (tmp_path / name).mkdir()
    commands = [
        [
            "-c",
            APART,
            f"localhost:{port}",
            str(i),
            str(tmp_path / "both"),
            str(tmp_path / f"own{i}"),
        ]
        for i in range(2)
    ]
    said = together(commands, devices=1)
    assert [code for code, _ in said] == [2, 2], said
    for i, (_, (out, error)) in enumerate(said):
        assert "shared" in out
        assert f"own{i}: process 1 does not see there what process 0 has written" in error
        assert "Traceback" not in error
    assert not any(path.is_file() for path in tmp_path.rglob("*"))


def test_processes_with_other_numbers_of_devices_are_refused(monkeypatch):
    counts = {0: 4, 1: 2}
    devices = [types.SimpleNamespace(process_index=i) for i in counts for _ in range(counts[i])]
    monkeypatch.setattr(jax, "devices", lambda: devices)
    with pytest.raises(ValueError, match="as many devices each, but .* process 0: 4, process 1: 2"):
        hosts.check_devices()


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("a:1", None, 0), "--num_processes missing"),
        ((None, 2, None), "--coordinator, --process_id missing"),
        (("a:1", 2, 2), "--process_id=2: must be from 0 to 1"),
        (("a", 2, 0), "--coordinator='a': must be host:port"),
    ],
)
def test_flags_that_make_no_sense_are_refused(flags, told):
    with pytest.raises(ValueError, match=re.escape(told)):
        hosts.join(*flags)


def test_alone_nothing_is_joined(monkeypatch):
    calls = []

    def initialize(*args, cluster_detection_method=None):
        calls.append(args)
        if not args:
            raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    hosts.join(None, 1, None)
    assert calls == []
    hosts.join(None, None, None)  # JAX finds no others
    hosts.join("a:1", 2, 1)
    assert calls == [(), ("a:1", 2, 1)]


def test_what_the_first_process_does_alone():
    assert hosts.is_first() and hosts.first_does(lambda: 3) == 3
    assert hosts.first_tells(lambda: {"a": 3}) == {"a": 3}
    hosts.check_devices()
    with pytest.raises(OSError, match="full"), hosts.first_enters(failing, elsewhere=None):
        pass
    with hosts.first_enters(lambda: io.StringIO("x"), elsewhere=None) as file:
        assert file.read() == "x"
    assert file.closed


def failing():
    raise OSError("full")
