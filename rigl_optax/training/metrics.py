"""Metrics on disk: one JSON object per line, and TensorBoard events."""

import contextlib
import json
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import tensorboardX

FILE = "metrics.jsonl"
Write = Callable[[str, int, dict[str, float]], None]


def read(path: pathlib.Path) -> list[dict[str, Any]]:
    """All complete records of a file; a last line that was cut off by a crash is left out.

    Raises:
      ValueError: If a line other than the last is not a JSON object.
    """
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            if not isinstance(record, dict) or not isinstance(record.get("step"), int):
                raise ValueError("not an object with a step")
        except ValueError as error:
            if number == len(lines):
                break
            raise ValueError(f"{path}:{number}: not a metrics record ({error})") from error
        records.append(record)
    return records


def drop_after(path: pathlib.Path, step: int) -> None:
    """Removes what a run resumed at `step` is to write again: later records, and the test's."""
    kept = [r for r in read(path) if r["step"] <= step and r.get("kind") != "test"]
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(json.dumps(record) + "\n" for record in kept))
    temporary.replace(path)


@contextlib.contextmanager
def writer(
    workdir: pathlib.Path, resumed_at: int, spent: Callable[[int], float]
) -> Iterator[Write]:
    """A function `write(kind, step, values)` that appends to both kinds of file.

    Args:
      workdir: Gets `metrics.jsonl` and a folder `tensorboard`.
      resumed_at: The step training goes on from; what was recorded past it is dropped
        (TensorBoard is told to hide it).
      spent: Training FLOPs spent after a number of steps; `training_flops` in every record.

    Yields:
      The function. `kind` is `train`, `validation`, `rewiring` or `test`.
    """
    path = workdir / FILE
    drop_after(path, resumed_at)
    events = tensorboardX.SummaryWriter(
        str(workdir / "tensorboard"), purge_step=resumed_at + 1 if resumed_at else None
    )

    def write(kind: str, step: int, values: dict[str, float]) -> None:
        values = values | {"training_flops": spent(step)}
        file.write(json.dumps({"step": step, "kind": kind, **values}) + "\n")
        for name, value in values.items():
            events.add_scalar(f"{kind}/{name}", value, step)

    # Line buffering: a record is with the operating system before the next step starts.
    with path.open("a", buffering=1) as file:
        try:
            yield write
        finally:
            events.close()
