"""Compares a long run that is killed again and again with one that is not.

make soak                                    half an hour
python -m benchmarks.soak --minutes=5 --kills=12

Both rewire every 5 steps. The first run is not disturbed, and its memory is recorded. The second is
killed at random moments: at any time, while it writes a checkpoint, just before and just after a
rewiring. At the end weights, masks, optimizer state, records and results of both must be the same
bit for bit, the number of active weights that of the start, and the memory flat; and 1,000
checkpoints must leave no open files or threads behind. Otherwise it exits with an error.
"""

import argparse
import json
import os
import pathlib
import random
import signal
import statistics
import tempfile
import threading
import time

import jax.numpy as jnp

from benchmarks import crash_harness as harness
from rigl_optax.training import checkpoints, loop
from rigl_optax.training.state import TrainState, zero_sums

CONFIG = {
    "model.hidden": "100,50",
    "method.sparsity": "0.9",
    "method.every": "5",
    "method.until": "1.0",
    "log.every": "500",
    "eval.every": "5000",
    "checkpoint.every": "1000",
}
CHECKPOINTS = 1000
GROWTH = 0.05  # memory is flat if it grows by less from the second quarter of a run to the last


def left_alone(workdir: pathlib.Path, **keys: str) -> list[tuple[float, float]]:
    """Runs to the end; returns (seconds since the start, MB of resident memory) every second."""
    process = harness.start(workdir, **keys)
    began, memory = time.monotonic(), []
    while process.poll() is None:
        status = pathlib.Path(f"/proc/{process.pid}/status").read_text()
        lines = dict(line.split(":", 1) for line in status.splitlines())
        if "VmRSS" in lines:
            memory.append((time.monotonic() - began, int(lines["VmRSS"].split()[0]) / 1024))
        time.sleep(1)
    process.communicate()
    if process.returncode != 0:
        raise SystemExit(f"the run failed; see {workdir}")
    return memory


def left_behind(workdir: pathlib.Path) -> list[tuple[int, int]]:
    """Counts this process's open files and threads after a tenth of many checkpoints, and all."""
    counts = []
    with checkpoints.open_checkpoints(workdir, 2) as saved:
        for step in range(1, CHECKPOINTS + 1):
            state = TrainState(jnp.int32(step), {}, {}, {}, zero_sums(), None)
            checkpoints.save(saved, state)
            if step in (CHECKPOINTS // 10, CHECKPOINTS):
                saved.wait()
                counts.append((len(os.listdir("/proc/self/fd")), threading.active_count()))
    return counts


def killed(workdir: pathlib.Path, kills: int, seconds: float, seed: int, **keys: str) -> list[str]:
    """Runs to the end with kills on the way; returns how each launch ended.

    Args:
      workdir: The run's directory.
      kills: Number of kills to aim at.
      seconds: Duration of an undisturbed run, over which the kills are spread.
      seed: Seed of the moments.
      **keys: Keys of the config.
    """
    generator = random.Random(seed)
    ends: list[str] = []
    moments = (None, *harness.MOMENTS)
    while not (workdir / checkpoints.RESULT_FILE).exists():
        moment = moments[len(ends) % len(moments)]
        process = harness.start(workdir, **keys)
        if len(ends) < kills:
            harness.first_step(process, workdir)
            time.sleep(generator.uniform(0, 1.6 * seconds / kills))
            if moment is None:
                process.send_signal(signal.SIGKILL)
            else:
                harness.kill_at(process, workdir, moment, generator)
        process.communicate()
        if process.returncode not in (0, -signal.SIGKILL):
            raise SystemExit(f"a launch failed with {process.returncode}; see {workdir}")
        name = "at any time" if moment is None else moment.__name__
        ends.append("to the end" if process.returncode == 0 else name)
    return ends


def main() -> None:
    """Makes both runs and prints the comparison; exits with an error if anything differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        (files, threads), (files_at_end, threads_at_end) = left_behind(root / "many")
        print(
            f"{CHECKPOINTS:,} checkpoints: open files {files} -> {files_at_end}, "
            f"threads {threads} -> {threads_at_end}",
            flush=True,
        )
        if files_at_end > files + 5 or threads_at_end > threads + 5:
            raise SystemExit("checkpoints leave open files or threads behind")
        probe = root / "probe"
        left_alone(probe, **CONFIG, steps="5000")
        rate = json.loads((probe / checkpoints.RESULT_FILE).read_text())["steps_per_second"]
        # The run that is killed gets two thirds of the time: it starts and compiles at each launch.
        steps = max(5000, round(rate * 60 * options.minutes / 3 / 1000) * 1000)
        print(
            f"{steps:,} steps, {steps // 5:,} rewirings, {steps // 1000:,} checkpoints", flush=True
        )
        keys = CONFIG | {"steps": str(steps)}

        began = time.monotonic()
        memory = left_alone(root / "alone", **keys)
        took = time.monotonic() - began
        quarter = len(memory) // 4
        first, last = (
            statistics.median(m for _, m in part)
            for part in (memory[quarter : 2 * quarter], memory[-quarter:])
        )
        print(
            f"memory: {first:.0f} MB in the second quarter, {last:.0f} MB in the last", flush=True
        )

        ends = killed(root / "killed", options.kills, took, options.seed, **keys)
        counts = {end: ends.count(end) for end in ends}
        print(f"launches: {len(ends)}; ended {counts}", flush=True)

        harness.assert_same(root / "killed", root / "alone")
        result = json.loads((root / "killed" / checkpoints.RESULT_FILE).read_text())
        explained = json.loads((root / "killed" / loop.EXPLANATION_FILE).read_text())
        expected = {layer["path"]: layer["active"] for layer in explained["layers"]}
        if result["active_weights"] != expected:
            raise SystemExit(f"active weights {result['active_weights']}, at the start {expected}")
        print("the same bit for bit; active weights as at the start:", expected)
        if last > (1 + GROWTH) * first:
            raise SystemExit(f"memory grew by more than {100 * GROWTH:g} %")


if __name__ == "__main__":
    main()
