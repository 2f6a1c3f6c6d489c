"""Real training processes: killed, asked to stop, without disk space; then started again."""

import json
import random
import signal
import subprocess
import sys

import pytest

from benchmarks import crash_harness as harness
from benchmarks.crash_harness import ROOT, run
from rigl_optax.training import signals

# A checkpoint takes as long as 60 steps, and changes no numbers: where nothing happens, fewer.
RARELY = {"checkpoint.every": "200"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing happened to."""
    workdir = tmp_path_factory.mktemp("whole")
    completed = run(workdir, **RARELY)
    assert completed.returncode == 0, completed.stderr
    return workdir


@pytest.mark.slow
def test_killed_at_any_moment_and_started_again_it_ends_bit_for_bit_the_same(whole, tmp_path):
    assert harness.kill_often(tmp_path, times=22) >= 20
    assert not (tmp_path / "result.json").exists()
    completed = run(tmp_path, **RARELY)
    assert completed.returncode == 0, completed.stderr
    assert "resumed at step" in completed.stdout
    harness.assert_same(tmp_path, whole)


@pytest.mark.slow
def test_a_condensed_run_too(tmp_path):
    keys = harness.CONDENSED | {"steps": "400"}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert run(whole, **keys | RARELY).returncode == 0
    assert harness.kill_often(killed, times=8, seed=1, **keys) >= 6
    assert not (killed / "result.json").exists()
    completed = run(killed, **keys | RARELY)
    assert completed.returncode == 0, completed.stderr
    assert "resumed at step" in completed.stdout
    harness.assert_same(killed, whole)
    # Blocks and where they are: both are among what was compared.
    found = harness.final_leaves(killed)
    values = found["params/layers/0/kernel"]
    for name in ("rows", "cols"):
        where = found[f"opt_state/topologies/layers/0/kernel/{name}"]
        assert where.dtype == "int32" and where.shape == values.shape[:1]
    assert values.shape[1:] == (4, 4) and values.any()


@pytest.mark.slow
def test_asked_to_stop_it_saves_first_and_goes_on_from_there(whole, tmp_path):
    process = harness.start(tmp_path, **{"checkpoint.every": "0"})
    reached = lambda workdir, known: harness._last(workdir) is not None
    assert harness.kill_at(process, tmp_path, reached, random.Random(0), signal.SIGTERM)
    printed, _ = process.communicate()
    assert process.returncode == signals.STOPPED == 143
    (saved,) = (name for name in harness.names(tmp_path) if name.isdigit())
    assert f"asked to stop: saved at step {saved} of 1000" in printed
    completed = run(tmp_path, **RARELY)
    assert f"resumed at step {saved} of 1000" in completed.stdout
    harness.assert_same(tmp_path, whole)


@pytest.mark.slow
def test_without_room_on_the_disk_it_says_so_and_loses_nothing(whole, tmp_path):
    process = harness.start(tmp_path)
    assert harness.kill_at(process, tmp_path, harness.is_written, random.Random(0))
    process.communicate()
    before = {n for n in harness.names(tmp_path) if n.isdigit()}

    # Files of at most 2 kB: to write more is an error then, as on a full disk.
    little_room = ["bash", "-c", 'trap "" XFSZ; ulimit -f 2; exec "$@"', "bash"]
    failed = run(tmp_path, through=little_room)
    assert failed.returncode == 1
    assert "could not be written" in failed.stderr and "goes on from the newest" in failed.stderr
    assert "Traceback" not in failed.stderr
    assert before <= harness.names(tmp_path)
    completed = run(tmp_path, **RARELY)
    assert completed.returncode == 0, completed.stderr
    harness.assert_same(tmp_path, whole)


@pytest.mark.slow
def test_a_second_launch_on_a_workdir_is_refused_and_does_no_harm(whole, tmp_path):
    process = harness.start(tmp_path)
    try:
        while process.poll() is None and not (tmp_path / "config.json").exists():
            pass
        refused = run(tmp_path)
    finally:
        process.communicate()
    assert refused.returncode == 1
    assert "another process is training in this workdir" in refused.stderr
    assert process.returncode == 0
    harness.assert_same(tmp_path, whole)


@pytest.mark.slow
def test_the_command_line(tmp_path):
    refused = run(tmp_path / "a", sparsty="0.9")
    assert refused.returncode == 2
    (line,) = refused.stderr.splitlines()
    assert "sparsty" in line and "did you mean 'method.sparsity'" in line

    # Refused by the library, below several layers of JAX and of this package.
    refused = run(tmp_path / "a", **{"method.grow": "up"})
    assert refused.returncode == 2 and len(refused.stderr.splitlines()) == 1, refused.stderr
    assert not (tmp_path / "a").exists()

    completed = run(tmp_path / "b", steps="20")
    assert completed.returncode == 0, completed.stderr
    assert "layers/0/kernel" in completed.stdout and "\x1b" not in completed.stdout

    evaluated = subprocess.run(
        [sys.executable, "scripts/evaluate.py", f"--workdir={tmp_path / 'b'}", "--split=test"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert evaluated.returncode == 0, evaluated.stderr
    accuracy = json.loads((tmp_path / "b" / "result.json").read_text())["test"]["accuracy"]
    assert f"accuracy {100 * accuracy:.2f} %" in evaluated.stdout
