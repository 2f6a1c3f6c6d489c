import json
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]


def run(*arguments):
    command = [sys.executable, "scripts/explain.py", "--config=configs/digits_lenet.py", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.slow
def test_explains_a_config_as_json():
    pytest.importorskip("sklearn")
    done = run(
        "--json",
        "--config.method.sparsity=.9",
        "--config.steps=2000",
        "--config.method.every=100",
        "--config.method.until=.75",
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["sparsity"] == pytest.approx(0.9, abs=1e-4)
    assert report["flops_dense"] == 2 * (64 * 300 + 300 * 100 + 100 * 10)
    assert report["rewirings"] == 15 and report["warnings"] == []


@pytest.mark.slow
def test_refuses_unknown_keys():
    done = run("--config.sparseness=.9")
    assert done.returncode == 2 and "config.sparseness: there is no such key" in done.stderr
