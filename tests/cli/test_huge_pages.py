"""Training starts itself anew with large blocks of memory in huge pages, unless told otherwise."""

import os
import pathlib
import platform
import subprocess
import sys
import time

import pytest

from benchmarks.crash_harness import ROOT

TUNABLE = "glibc.malloc.hugetlb=1"
PROGRAM = """
import os, resource, sys
from rigl_optax_cli import huge_pages

if sys.argv[1] == "use":
    huge_pages.use()
import numpy as np

def faults(bytes):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = bytearray(bytes)
    for i in range(0, bytes, 4096):
        block[i] = 1
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(os.getpid(), os.environ.get("GLIBC_TUNABLES"), sys.flags.utf8_mode, sys.argv[1:], sep="|")
print(faults(96 << 20))
"""
pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")


def clean():
    decided = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")
    return {k: v for k, v in os.environ.items() if not k.startswith(decided)}


def run(*arguments, **environment):
    command = [sys.executable, "-X", "utf8", "-c", PROGRAM, *arguments]
    process = subprocess.Popen(
        command, env=clean() | environment, cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    out, _ = process.communicate()
    assert process.returncode == 0
    first, faults = out.splitlines()
    pid, tunables, utf8, arguments = first.split("|")
    return int(pid) == process.pid, tunables, utf8, arguments, int(faults)


def test_it_is_the_same_process_with_the_same_arguments_and_fewer_faults():
    is_same, tunables, utf8, arguments, faults = run("use", "--a=b c", "d")
    assert is_same and tunables == TUNABLE and utf8 == "1"
    assert arguments == "['use', '--a=b c', 'd']"
    *_, ordinary = run("not")
    enabled = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not enabled.exists() or "[madvise]" not in enabled.read_text():
        pytest.skip("this system has no huge pages, or gives them unasked")
    assert ordinary > 20_000 and faults < ordinary / 20


@pytest.mark.parametrize("name", ["MALLOC_ARENA_MAX", "GLIBC_TUNABLES"])
def test_what_the_environment_says_stays(name):
    value = "glibc.malloc.hugetlb=0" if name == "GLIBC_TUNABLES" else "2"
    _, tunables, *_ = run("use", **{name: value})
    assert tunables == (value if name == "GLIBC_TUNABLES" else "None")


@pytest.mark.parametrize("script", ["train", "compare"])
def test_the_scripts_that_train_do_so_first(script, tmp_path):
    command = [sys.executable, f"scripts/{script}.py", "--config=configs/digits_lenet.py"]
    process = subprocess.Popen(
        [*command, f"--workdir={tmp_path}"], env=clean(), cwd=ROOT, stdout=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 60
        while TUNABLE not in pathlib.Path(f"/proc/{process.pid}/environ").read_text():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        process.kill()
        process.wait()
