"""Metrics on disk: one JSON object per line, and TensorBoard events."""

import contextlib
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import tensorboardX

from rigl_optax.training import files

FILE = "metrics.jsonl"
FORWARD_FLOPS = "forward_flops"  # of one example, in `rewiring` records
WARNING = "warning"  # a kind of record: `warning` names what it is about, `text` says it
ROLLBACK = "rollback"  # a kind of record: at the step gone back to, `from` the step gone back at
Values = Mapping[str, float | str]
Records = list[dict[str, Any]]
Write = Callable[[str, int, Values], None]


def write_nothing(kind: str, step: int, values: Values) -> None:
    """What a process has for writing that leaves it to another."""
    del kind, step, values


def read(path: pathlib.Path) -> list[dict[str, Any]]:
    """All complete records of a file; a last line that was cut off by a crash is left out.

    Raises:
      ValueError: If a line other than the last is not a JSON object.
    """
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = files.parse(line, files.RECORD)
        except ValueError as error:
            if number == len(lines):
                break
            raise ValueError(f"{path}:{number}: not a metrics record ({error})") from error
        records.append(record)
    return records


def until(records: Records, step: int) -> Records:
    """What a run that goes on at a step does not record again: all up to it but the test's."""
    return [r for r in records if r["step"] <= step and r["kind"] != "test"]


def recorded(records: Records, kind: str, name: str) -> dict[int, float]:
    """What was recorded of one thing: its value by the updates done."""
    return {r["step"]: float(r[name]) for r in records if r["kind"] == kind and name in r}


def curve(records: Records) -> list[dict[str, float]]:
    """What every evaluation on the validation split measured, with its `step`."""
    found = [r for r in records if r["kind"] == "validation"]
    return [{k: v for k, v in r.items() if k not in ("kind", "training_flops")} for r in found]


def went_back_from(records: Records, step: int) -> int:
    """The step that a run, now at `step`, has last gone back from; 0 if it never has."""
    found = recorded(records, ROLLBACK, "from")
    return max((int(origin) for to, origin in found.items() if to <= step), default=0)


def warnings(records: Records) -> dict[str, str]:
    """What has been warned of, each kind once, in the order in which it was told."""
    found = [r for r in records if r["kind"] == WARNING]
    return {str(r[WARNING]): str(r["text"]) for r in found if WARNING in r and "text" in r}


def looks(records: Records, step: int) -> list[tuple[int, float]]:
    """What a forward pass cost at each look at the masks up to a step: (updates done, FLOPs)."""
    found = recorded(records, "rewiring", FORWARD_FLOPS)
    return [(done, flops) for done, flops in found.items() if done <= step]


def drop_after(path: pathlib.Path, step: int) -> None:
    """Removes what a run resumed at `step` is to write again: later records, and the test's."""
    kept = until(read(path), step)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(json.dumps(record) + "\n" for record in kept))
    sync(temporary)
    files.put_in_place(temporary, path)


def sync(path: pathlib.Path) -> None:
    """Sees to it that what has been written into a file outlives a power cut."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


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
      The function. `kind` is `train`, `validation`, `rewiring`, `spike`, `rollback`, `warning` or
      `test`.
    """
    path = workdir / FILE
    drop_after(path, resumed_at)
    events = tensorboardX.SummaryWriter(
        str(workdir / "tensorboard"), purge_step=resumed_at + 1 if resumed_at else None
    )

    def write(kind: str, step: int, values: Values) -> None:
        values = {**values, "training_flops": spent(step)}
        file.write(json.dumps({"step": step, "kind": kind, **values}) + "\n")
        for name, value in values.items():
            add = events.add_text if isinstance(value, str) else events.add_scalar
            add(f"{kind}/{name}", value, step)

    # Line buffering: a record is with the operating system before the next step starts.
    with path.open("a", buffering=1) as file:
        try:
            yield write
        finally:
            events.close()
