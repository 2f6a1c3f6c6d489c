"""Runs every check and measurement of this library on the GPU or TPU of this machine.

    make accelerator                      with the python3 whose JAX finds the device
    python benchmarks/accelerator.py [--only products] [--out runs/accelerator] [--tiny]

Each part is a process of its own with a time limit, eight minutes in all. What it finds is on disk
as soon as it is there: `OUT/PART.jsonl` has a line for each figure, `OUT/PART.log` what was
printed, `OUT/results.json` everything so far. A part that fails, or that is stopped at its limit,
keeps what it has and never stops the next. At the end a table is printed for each part; the exit
status is 0 if all parts came to their end and no row failed.

`--tiny` runs all parts at toy sizes, in about a minute on a CPU: it shows that the command works.
`docs/accelerators.md` says what the figures mean.
"""

import argparse
import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]
# Seconds that each part may take, in the order in which they run.
LIMITS = {
    "devices": 20,
    "core": 65,
    "mosaic_gpu": 45,
    "optimizer": 65,
    "resnet50": 75,
    "gpt": 50,
    "products": 60,
    "condensed": 50,
    "train": 50,
}
TINY_LIMIT = 400  # on a busy CPU
SCRIPT = ROOT / "benchmarks" / "accelerator_parts.py"


def run(part: str, out: pathlib.Path, limit: float, is_tiny: bool) -> dict[str, Any]:
    """Runs one part in a process of its own; stops it, and all it started, at its limit.

    Args:
      part: Its name, a key of `LIMITS`.
      out: Where its rows and its output go.
      limit: Seconds.
      is_tiny: Whether at toy sizes.

    Returns:
      The part's name, how it ended, the seconds it took, and its rows.
    """
    rows, log = out / f"{part}.jsonl", out / f"{part}.log"
    rows.unlink(missing_ok=True)
    command = [sys.executable, str(SCRIPT), part, str(rows)]
    # The part leaves out what no longer fits; the limit here is for what hangs.
    command += [f"--seconds={0.95 * limit - 2}"] + ["--tiny"] * is_tiny
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    if is_tiny:  # nothing is learnt from these figures: programs are compiled quickly instead
        quick = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
        os.environ.setdefault("XLA_FLAGS", quick)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
    start = time.monotonic()
    with log.open("w") as file:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = process.wait(limit)
            ended = "finished" if not status else f"exit status {status}: {_last_line(log)}"
        except subprocess.TimeoutExpired:
            ended = f"stopped after {limit:.0f} s"
        finally:
            _stop(process)
    return {
        "part": part,
        "ended": ended,
        "seconds": round(time.monotonic() - start, 1),
        "rows": read(rows),
    }


def read(path: pathlib.Path) -> list[dict[str, Any]]:
    """Reads the rows that are complete; the last may be cut off."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            break
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """Lays rows out below each other, with a heading wherever the columns change."""
    lines: list[str] = []
    for same in _runs_of_equal_columns(rows):
        columns = list(same[0])
        cells = [columns, *([_shown(row[c]) for c in columns] for row in same)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        for row in cells:
            lines.append("  " + "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)))
    return "\n".join(line.rstrip() for line in lines)


def main() -> None:
    """Runs the parts and prints what they found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="toy sizes, for a CPU")
    parser.add_argument("--only", choices=list(LIMITS), action="append", help="some parts")
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "runs" / "accelerator")
    options = parser.parse_args()
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    reports: list[dict[str, Any]] = []
    for part in options.only or LIMITS:
        limit = TINY_LIMIT if options.tiny else LIMITS[part]
        report = run(part, out, limit, options.tiny)
        reports.append(report)
        unfinished = out / "results.json.unfinished"
        unfinished.write_text(json.dumps({"tiny": options.tiny, "parts": reports}, indent=1) + "\n")
        unfinished.replace(out / "results.json")
        print(f"\n{part}: {report['ended']}, {report['seconds']} s", flush=True)
        print(table(report["rows"]), flush=True)
    print(f"\n{out / 'results.json'}; output of each part in {out}/PART.log")
    failed = [r["part"] for r in reports if r["ended"] != "finished"]
    failed += [
        f"{r['part']}: {row['name']}" for r in reports for row in r["rows"] if failed_in(row)
    ]
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def failed_in(row: dict[str, Any]) -> bool:
    """Whether a row reports an error, or a result that is not as promised."""
    return "error" in row or row.get("as_promised") is False


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Ends a process and all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _last_line(log: pathlib.Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip()[:200] if lines else "no output"


def _runs_of_equal_columns(rows: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    found: list[list[dict[str, Any]]] = []
    for row in rows:
        if not found or list(found[-1][0]) != list(row):
            found.append([])
        found[-1].append(row)
    return found


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
