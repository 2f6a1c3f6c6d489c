"""Metrics on disk: one JSON object per line, and TensorBoard events."""

import contextlib
import itertools
import json
import math
import os
import pathlib
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from tensorboardX import record_writer, summary
from tensorboardX.proto import event_pb2

from rigl_optax.training import files

FILE = "metrics.jsonl"
FORWARD_FLOPS = "forward_flops"  # of one example, in `rewiring` records
WARNING = "warning"  # a kind of record: `warning` names what it is about, `text` says it
ROLLBACK = "rollback"  # a kind of record: at the step gone back to: `from` where, `times` so far
Values = Mapping[str, float | str]
Records = list[dict[str, Any]]
Write = Callable[[str, int, Values], None]
_QUEUED = 1000  # records that wait for TensorBoard's file at most; later ones are dropped
_FLUSH_EVERY = 10.0  # seconds
_PATIENCE = 5.0  # seconds that the end of a run waits for that file
_files = itertools.count()  # TensorBoard names files by the second: two of one second differ by it


def write_nothing(kind: str, step: int, values: Values) -> None:
    """Writes nothing: for processes that leave it to process 0."""
    del kind, step, values


def read(path: pathlib.Path) -> list[dict[str, Any]]:
    """Reads all complete records of a file, without a last line that a crash has cut off.

    Raises:
      ValueError: If a line other than the last is not a JSON object.
    """
    lines = path.read_bytes().splitlines() if path.exists() else []
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = files.parse(line.decode(), files.RECORD)
        except ValueError as error:
            if number == len(lines):
                break
            raise ValueError(f"{path}:{number}: not a metrics record ({error})") from error
        records.append(record)
    return records


def until(records: Records, step: int) -> Records:
    """Returns the records that a run does not write again when it goes on at a step."""
    return [r for r in records if r["step"] <= step and r["kind"] != "test"]


def recorded(records: Records, kind: str, name: str) -> dict[int, float]:
    """Returns the values recorded under one name: `{step: value}`."""
    return {r["step"]: float(r[name]) for r in records if r["kind"] == kind and name in r}


def curve(records: Records) -> list[dict[str, float]]:
    """Returns all evaluations on the validation split, each with its `step`."""
    found = [r for r in records if r["kind"] == "validation"]
    return [{k: v for k, v in r.items() if k not in ("kind", "training_flops")} for r in found]


def went_back_from(records: Records, step: int) -> int:
    """Returns the step that a run, now at `step`, last went back from; 0 if it never has."""
    found = recorded(records, ROLLBACK, "from")
    return max((int(origin) for to, origin in found.items() if to <= step), default=0)


def times_gone_back(records: Records, step: int) -> int:
    """Counts how often a run, now at `step`, has gone back."""
    found = recorded(records, ROLLBACK, "times")
    return max((int(times) for to, times in found.items() if to <= step), default=0)


def warnings(records: Records) -> dict[str, str]:
    """Returns all warnings by kind, in the order in which they came."""
    found = [r for r in records if r["kind"] == WARNING]
    return {str(r[WARNING]): str(r["text"]) for r in found if WARNING in r and "text" in r}


def forward_flops(records: Records, step: int) -> list[tuple[int, float]]:
    """Returns what a forward pass cost after each rewiring up to a step: (updates done, FLOPs)."""
    found = recorded(records, "rewiring", FORWARD_FLOPS)
    return [(done, flops) for done, flops in found.items() if done <= step]


def drop_after(path: pathlib.Path, step: int) -> None:
    """Removes the records that a run resumed at `step` writes again: later ones, and the test's."""
    kept = until(read(path), step)
    with files.replacing(path) as file:
        file.writelines(json.dumps(r, allow_nan=False).encode() + b"\n" for r in kept)


def sync(path: pathlib.Path) -> None:
    """Waits until a file is on the disk, so that it outlives a power cut."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


class _Events:
    """TensorBoard's events, written by a thread of their own: they never block or end a run.

    What cannot be written is dropped, and said once.
    """

    def __init__(self, folder: pathlib.Path, purge_step: int | None, say: Callable[[str], None]):
        self._say = say
        self._failure: str | None = None
        self._is_reported = False
        self._queue: queue.Queue[event_pb2.Event | None] = queue.Queue(_QUEUED)
        self._thread = threading.Thread(
            target=self._run, args=(folder.absolute(),), name="tensorboard", daemon=True
        )
        self._thread.start()
        if purge_step is not None:
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._put(event_pb2.Event(step=purge_step, session_log=start))

    def add(self, kind: str, step: int, values: Values) -> None:
        """Hands over a record; does not wait."""
        found = event_pb2.Event(step=step, wall_time=time.time())
        for name, value in values.items():
            make = summary.text if isinstance(value, str) else summary.scalar
            found.summary.value.extend(make(f"{kind}/{name}", value).value)
        self._put(found)

    def close(self) -> None:
        """Waits until all is written, but not for long."""
        with contextlib.suppress(queue.Full):
            self._queue.put(None, timeout=_PATIENCE)
        self._thread.join(_PATIENCE)
        if self._thread.is_alive():
            self._failure = self._failure or f"writing takes more than {_PATIENCE:g} s"
        self._report()

    def _put(self, event: event_pb2.Event) -> None:
        try:
            self._queue.put_nowait(event)
        except queue.Full:
            self._failure = self._failure or "writing is too slow"
        self._report()

    def _report(self) -> None:
        if self._failure is not None and not self._is_reported:
            self._is_reported = True
            self._say(
                f"warning: TensorBoard's events are incomplete ({self._failure}); {FILE} has all"
            )

    def _run(self, folder: pathlib.Path) -> None:
        try:
            self._write(folder)
        except Exception as error:  # whatever it is, the run goes on without
            self._failure = self._failure or str(error)
            while self._queue.get() is not None:
                pass

    def _write(self, folder: pathlib.Path) -> None:
        folder.mkdir(exist_ok=True)
        now, name = time.time(), f"{socket.gethostname()}.{os.getpid()}.{next(_files)}"
        file = record_writer.RecordWriter(str(folder / f"events.out.tfevents.{now:.0f}.{name}"))
        try:
            version = event_pb2.Event(wall_time=now, file_version="brain.Event:2")
            file.write(version.SerializeToString())
            flushed = -math.inf
            while (event := self._queue.get()) is not None:
                file.write(event.SerializeToString())
                if time.monotonic() - flushed > _FLUSH_EVERY:
                    file.flush()
                    flushed = time.monotonic()
            file.flush()
        finally:
            # What is left in its buffer is lost if there is no room for it.
            with contextlib.suppress(OSError):
                file.close()


@contextlib.contextmanager
def writer(
    workdir: pathlib.Path,
    resumed_at: int,
    spent: Callable[[int], float],
    say: Callable[[str], None] = print,
) -> Iterator[Write]:
    """Yields a function `write(kind, step, values)` that appends to both kinds of file.

    Args:
      workdir: Gets `metrics.jsonl` and a folder `tensorboard`.
      resumed_at: The step training goes on from; what was recorded past it is dropped
        (TensorBoard hides it).
      spent: Training FLOPs spent after a number of steps; `training_flops` in every record.
      say: Called once if TensorBoard's events cannot be written; then only they are missing.

    Yields:
      The function. `kind` is `train`, `validation`, `rewiring`, `spike`, `rollback`, `warning` or
      `test`.
    """
    path = workdir / FILE
    drop_after(path, resumed_at)
    events = _Events(workdir / "tensorboard", resumed_at + 1 if resumed_at else None, say)

    def write(kind: str, step: int, values: Values) -> None:
        values = {**values, "training_flops": spent(step)}
        record = {"step": step, "kind": kind, **values}
        file.write(json.dumps(record, allow_nan=False) + "\n")
        events.add(kind, step, values)

    # Line buffering: a record is with the operating system before the next step starts.
    try:
        with path.open("a", buffering=1) as file:
            yield write
    finally:
        events.close()
