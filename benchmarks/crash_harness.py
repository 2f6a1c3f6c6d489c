"""Starts real training processes and kills them at chosen moments, for tests and `soak.py`."""

import json
import multiprocessing.forkserver
import os
import pathlib
import random
import signal
import subprocess
import sys
import time
from typing import Any

import jax
import numpy as np

import rigl_optax_cli
from rigl_optax.training import checkpoints, mesh, metrics, setup
from rigl_optax.training import config as config_lib

ROOT = pathlib.Path(__file__).parents[1]
SMALL = {
    "model.hidden": "20,10",
    "method.sparsity": "0.8",
    "steps": "1000",
    "log.every": "10",
    "eval.every": "20",
    "checkpoint.every": "20",
    "method.every": "7",
}
CONDENSED = {
    "method.condensed": "True",
    "method.structure": {
        "name": "unstructured",
        "layers": (("layers/[01]/kernel", {"name": "block", "rows": 4, "cols": 4, "pad": True}),),
    },
    "model.dense_layers": "layers/2",
}


def command(workdir, **keys) -> list[str]:
    """Returns the command of a small run on the digits; `keys` change its config."""
    overrides = [f"--config.{key}={value}" for key, value in (SMALL | keys).items()]
    script = [sys.executable, "scripts/train.py", "--config=configs/digits_lenet.py"]
    return [*script, f"--workdir={workdir}", *overrides]


def run(workdir, through=(), **keys) -> subprocess.CompletedProcess[str]:
    """Runs to the end, or until it fails; `through` is a command that starts the run."""
    return subprocess.run(
        [*through, *command(workdir, **keys)], cwd=ROOT, capture_output=True, text=True, check=False
    )


def start(workdir, **keys) -> subprocess.Popen[str]:
    """Starts a run and does not wait for it."""
    return subprocess.Popen(
        command(workdir, **keys),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


def fork(workdir, **keys) -> "_Forked":
    """Starts a run as `start` does, in a process that need not import everything first.

    That is half of what a start costs. It is forked from a server that has imported what runs
    import, and computed nothing.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "rigl_optax_cli.train"])
    return _Forked(context.Process(target=_train, args=(command(workdir, **keys)[2:],)))


class _Forked:
    """A forked run, as `subprocess.Popen` shows it."""

    def __init__(self, process: Any):
        self._process = process
        process.start()
        self.pid = process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def communicate(self) -> None:
        self._process.join()


def _train(flags: list[str]) -> None:
    """Does what `scripts/train.py FLAGS...` does, and prints nothing."""
    os.chdir(ROOT)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    sys.exit(rigl_optax_cli.main(["train", *flags]))


def names(workdir) -> set[str]:
    """Lists what is in the folder of checkpoints; finished ones have a number as their name."""
    return {path.name for path in (workdir / "checkpoints").glob("*")}


def is_written(workdir, known) -> bool:
    """Tells whether a new checkpoint is there."""
    return any(name.isdigit() for name in names(workdir) - known)


def is_being_written(workdir, known) -> bool:
    """Tells whether the temporary directory of a checkpoint is there."""
    return any(not name.isdigit() for name in names(workdir) - known)


def has_rewired(workdir, known) -> bool:
    """Tells whether a rewiring has been recorded after a new checkpoint."""
    return is_written(workdir, known) and _last(workdir) == "rewiring"


def is_about_to_rewire(workdir, known) -> bool:
    """Tells whether, after a new checkpoint, a rewiring is at most a few steps away."""
    return is_written(workdir, known) and _last(workdir) == "train"


MOMENTS = (is_written, is_being_written, has_rewired, is_about_to_rewire)


def _last(workdir) -> str | None:
    """Reads the kind of the last record."""
    path = workdir / metrics.FILE
    if not path.exists() or path.stat().st_size < 1000:
        return None
    with path.open("rb") as file:
        file.seek(-min(path.stat().st_size, 10_000), os.SEEK_END)  # more than a record
        lines = file.read().decode(errors="replace").splitlines()
    try:
        return json.loads(lines[-1]).get("kind")
    except ValueError:
        return None


def first_step(process, workdir) -> None:
    """Waits until the run has got going: it has recorded something new, or ended."""
    path = workdir / metrics.FILE
    before = path.stat().st_mtime_ns if path.exists() else None
    while process.poll() is None:
        if path.exists() and path.stat().st_mtime_ns != before and path.stat().st_size:
            return
        time.sleep(0.01)


def kill_at(process, workdir, moment, generator, number=signal.SIGKILL, patience=120.0) -> bool:
    """Sends a signal at a moment, or up to 50 ms after it; False if the process ended before."""
    known = names(workdir)
    deadline = time.monotonic() + patience
    while process.poll() is None and time.monotonic() < deadline:
        if moment(workdir, known):
            time.sleep(generator.choice([0.0, generator.uniform(0, 0.05)]))
            break
        time.sleep(0.001)
    if process.poll() is not None:
        return False
    os.kill(process.pid, number)
    return True


def kill_often(workdir, times, seed=0, **keys) -> int:
    """Starts and kills a run `times` times, at all kinds of moments; returns how often it hit."""
    generator = random.Random(seed)
    kills = 0
    for i in range(times):
        process = fork(workdir, **keys)
        kills += kill_at(process, workdir, MOMENTS[i % len(MOMENTS)], generator)
        process.communicate()
    return kills


def final_leaves(workdir) -> dict[str, Any]:
    """Reads all arrays of the newest checkpoint, by their paths in the state."""
    config = config_lib.from_mapping(checkpoints.read_config(workdir))
    like = setup.prepare(mesh.fitting(config)).initial
    with checkpoints.read_checkpoints(workdir) as saved:
        state = checkpoints.restore_newest(saved, like, print)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    }


def assert_same(workdir, whole) -> None:
    """Compares the states, records and results of two runs bit for bit."""
    found, expected = final_leaves(workdir), final_leaves(whole)
    assert found.keys() == expected.keys()
    for path, leaf in expected.items():
        assert found[path].dtype == leaf.dtype
        np.testing.assert_array_equal(found[path], leaf, err_msg=path)
    assert metrics.read(workdir / metrics.FILE) == metrics.read(whole / metrics.FILE)
    results = [json.loads((d / checkpoints.RESULT_FILE).read_text()) for d in (workdir, whole)]
    for key in ("test", "validation", "active_weights", "coverage", "fingerprints"):
        assert results[0][key] == results[1][key]
