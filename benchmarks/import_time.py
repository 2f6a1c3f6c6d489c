"""Measures how long `import rigl_optax` takes, beside `import optax` and `import jax`.

    python benchmarks/import_time.py --rounds=15

Each import is a process of its own; the three take turns, in alternating order. Printed are medians
of the seconds by the clock and of processor time, less those of a Python that imports nothing, and
the median over rounds of the ratio to Optax in processor time, which other programs on the machine
disturb less.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time

MODULES = ("", "jax", "optax", "rigl_optax")
# As after an installation: modules are compiled once, not at each import.
ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}


def seconds(module: str) -> tuple[float, float]:
    """Returns the seconds of an import by the clock, and of processor time."""
    command = [sys.executable, "-c", f"import {module}" if module else ""]
    before, begin = os.times(), time.perf_counter()
    subprocess.run(command, check=True, env=ENVIRONMENT)
    end, after = time.perf_counter(), os.times()
    user = after.children_user - before.children_user
    return end - begin, user + after.children_system - before.children_system


def main() -> None:
    """Prints the medians."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=15)
    rounds = []
    for i in range(parser.parse_args().rounds + 1):
        order = MODULES[::-1] if i % 2 else MODULES
        rounds.append({module: seconds(module) for module in order})
    del rounds[0]  # it reads the files, and compiles them
    for module in MODULES[1:]:
        clock, processor = (
            statistics.median(each[module][kind] - each[""][kind] for each in rounds)
            for kind in (0, 1)
        )
        print(f"{module:<12}{clock:7.3f} s by the clock{processor:7.3f} s of processor time")
    ratios = [
        (each["rigl_optax"][1] - each[""][1]) / (each["optax"][1] - each[""][1]) for each in rounds
    ]
    low, middle, high = statistics.quantiles(ratios, n=4)
    print(f"rigl_optax / optax: {middle:.2f} (quartiles {low:.2f} to {high:.2f})")


if __name__ == "__main__":
    main()
