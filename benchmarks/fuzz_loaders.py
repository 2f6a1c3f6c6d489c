"""Feeds mutated files to every loader; each must be loaded, or rejected with one clear error.

make fuzz                                                  10,000 files in all
python -m benchmarks.fuzz_loaders --loaders=config --files=1000 --seed=7

Each loader is fuzzed in a process of its own, so that a crash or a hang is noticed and named.
"""

import argparse
import faulthandler
import math
import pathlib
import random
import subprocess
import sys
import tempfile
import time
import warnings

# Number of files for each loader, per thousand.
SHARES = {
    "idx": 100,
    "tfrecord": 80,
    "example": 80,
    "jpeg": 100,
    "png": 80,
    "tfds_tfrecord": 80,
    "tfds_array_record": 80,
    "image_folder": 40,
    "cifar10": 20,
    "config": 90,
    "metrics": 90,
    "record": 60,
    "result": 60,
    "page": 10,
    "export": 40,
    "weights": 30,
    "checkpoint": 30,
}
PATIENCE = 60  # seconds for one file


def fuzz(name: str, count: int, seed: int) -> None:
    """Fuzzes one loader; prints how many files it loaded and rejected."""
    from benchmarks import loader_fuzz

    warnings.simplefilter("ignore")
    generator = random.Random(f"{name} {seed}")
    ends = {"taken": 0, "refused": 0}
    slowest = 0.0
    with tempfile.TemporaryDirectory() as folder:
        target = loader_fuzz.targets(pathlib.Path(folder))[name]
        target.load()
        for _ in range(count):
            faulthandler.dump_traceback_later(PATIENCE, exit=True)
            began = time.monotonic()
            ends[loader_fuzz.trial(target, generator)] += 1
            slowest = max(slowest, time.monotonic() - began)
        faulthandler.cancel_dump_traceback_later()
    print(
        f"{name:17} {count:6,} files: {ends['taken']:,} taken, {ends['refused']:,} refused, "
        f"slowest {slowest:.2f} s",
        flush=True,
    )


def main() -> None:
    """Fuzzes the loaders one after the other; exits with an error if one has failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--loaders", default=",".join(SHARES))
    parser.add_argument("--files", type=int, default=10_000, help="of all loaders together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    names = options.loaders.split(",")
    if unknown := sorted(set(names) - set(SHARES)):
        parser.error(f"no loaders {unknown}; there are {', '.join(SHARES)}")
    if options.alone:
        fuzz(names[0], options.files, options.seed)
        return
    failed = []
    for name in names:
        share = options.files * SHARES[name] / sum(SHARES[n] for n in names)
        count = math.ceil(share)  # at least as many as asked for
        command = [sys.executable, "-m", "benchmarks.fuzz_loaders", "--alone", f"--loaders={name}"]
        command += [f"--files={count}", f"--seed={options.seed}"]
        found = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
        if found.returncode != 0:
            failed.append(name)
            print(f"{name}: ended with {found.returncode}\n{found.stderr[-3000:]}", flush=True)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
