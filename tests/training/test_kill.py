"""Real training processes, killed and started again with the same command."""

import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from rigl_optax.training import checkpoints, metrics, setup
from rigl_optax.training import config as config_lib

ROOT = pathlib.Path(__file__).parents[2]
SMALL = {
    "hidden": "20,10",
    "sparsity": "0.8",
    "steps": "600",
    "log_every": "10",
    "eval_every": "20",
    "checkpoint_every": "20",
    "rewire_every": "7",
}


def command(workdir, **keys):
    overrides = [f"--config.{key}={value}" for key, value in (SMALL | keys).items()]
    script = [sys.executable, "scripts/train.py", "--config=configs/digits_lenet.py"]
    return [*script, f"--workdir={workdir}", *overrides]


def run(workdir, **keys):
    return subprocess.run(
        command(workdir, **keys), cwd=ROOT, capture_output=True, text=True, check=False
    )


def final_leaves(workdir):
    config = config_lib.from_mapping(json.loads((workdir / "config.json").read_text()))
    with checkpoints.open_checkpoints(workdir, 2) as saved:
        state = checkpoints.restore_newest(saved, setup.prepare(config).initial, print)
    return jax.tree.leaves(state)


@pytest.mark.slow
def test_killed_at_any_moment_and_started_again_it_ends_bit_for_bit_the_same(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    completed = run(whole)
    assert completed.returncode == 0, completed.stderr
    generator = random.Random(0)
    kills = 0
    for _ in range(3):
        process = subprocess.Popen(
            command(killed), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        # From its first new checkpoint on, at a random moment: also within the writing of one.
        deadline = time.monotonic() + 120
        names = {p.name for p in (killed / "checkpoints").glob("[0-9]*")}
        while process.poll() is None and time.monotonic() < deadline:
            if {p.name for p in (killed / "checkpoints").glob("[0-9]*")} - names:
                time.sleep(generator.uniform(0, 0.3))
                break
            time.sleep(0.005)
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.wait()
    assert kills >= 2
    assert not (killed / "result.json").exists()
    completed = run(killed)
    assert completed.returncode == 0, completed.stderr
    assert "resumed at step" in completed.stdout
    for a, b in zip(final_leaves(killed), final_leaves(whole), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    assert metrics.read(killed / "metrics.jsonl") == metrics.read(whole / "metrics.jsonl")
    results = [json.loads((d / "result.json").read_text()) for d in (killed, whole)]
    assert results[0]["test"] == results[1]["test"]


@pytest.mark.slow
def test_the_command_line(tmp_path):
    refused = run(tmp_path / "a", sparsty="0.9")
    assert refused.returncode == 1
    assert "Traceback" not in refused.stderr
    assert "sparsty" in refused.stderr and "rewire_every" in refused.stderr

    refused = run(tmp_path / "a", sparsity="a lot")
    assert refused.returncode == 1 and "Traceback" not in refused.stderr

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
