"""`make accelerator`: a part that hangs or fails stops no other, and all parts run."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from benchmarks import accelerator

# Stands in for the parts: one hangs, one fails, all have written a row.
FAKE = """
import sys, time
part, rows = sys.argv[1:3]
with open(rows, "a") as file:
    file.write('{"name": "%s", "x": 1.5}\\n' % part)
    file.flush()
    if part == "core":
        file.write('{"name": "cut o')
        file.flush()
        time.sleep(60)
if part == "optimizer":
    sys.exit("no memory")
"""


def test_parts_that_hang_or_fail_keep_their_rows_and_stop_no_other(tmp_path, monkeypatch, capsys):
    script = tmp_path / "parts.py"
    script.write_text(FAKE)
    monkeypatch.setattr(accelerator, "SCRIPT", script)
    monkeypatch.setattr(accelerator, "TINY_LIMIT", 3)
    parts = ("devices", "core", "optimizer", "train")
    words = [f"--only={part}" for part in parts]
    monkeypatch.setattr(sys, "argv", ["accelerator", "--tiny", f"--out={tmp_path}", *words])
    with pytest.raises(SystemExit, match="failed: core, optimizer$"):
        accelerator.main()
    reports = json.loads((tmp_path / "results.json").read_text())["parts"]
    assert [r["part"] for r in reports] == list(parts)
    ended = ["finished", "stopped after 3 s", "exit status 1: no memory", "finished"]
    assert [r["ended"] for r in reports] == ended
    assert [r["rows"] for r in reports] == [[{"name": part, "x": 1.5}] for part in parts]
    assert "  core  1.5\n" in capsys.readouterr().out


def test_limits_are_eight_minutes_in_all():
    assert sum(accelerator.LIMITS.values()) <= 480


@pytest.mark.slow
def test_all_parts_run_at_toy_sizes(tmp_path):
    script = pathlib.Path(accelerator.__file__)
    command = [sys.executable, str(script), "--tiny", f"--out={tmp_path}"]
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
    found = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert not found.returncode, found.stdout + found.stderr
    parts = json.loads((tmp_path / "results.json").read_text())["parts"]
    assert [part["part"] for part in parts] == list(accelerator.LIMITS)
    rows = {part["part"]: part["rows"] for part in parts}
    for part, column in {
        "optimizer": "rewiring_x",
        "resnet50": "ordinary_x",
        "gpt": "ordinary_x",
        "products": "adam_x",
        "condensed": "times_as_fast",
    }.items():
        assert rows[part] and all(row[column] > 0 for row in rows[part])
    assert all(row["as_promised"] for row in rows["core"])
    assert {"dense", "rigl"} <= {row["name"] for row in rows["train"]}
