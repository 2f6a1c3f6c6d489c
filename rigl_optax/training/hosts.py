"""Several processes of one run: how they find each other, and what only process 0 does.

Every process runs the same program on the same global arrays. Process 0 alone writes files
and prints; checkpoints are written by all, each its own parts.
"""

import collections
import contextlib
import json
import os
import pathlib
import re
import secrets
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from rigl_optax.training import mistakes

PATIENCE = 5.0  # seconds for a file of one process to be seen by the others

LOST = 75  # the exit status of a process that another one has left; EX_TEMPFAIL: try again

T = TypeVar("T")
S = TypeVar("S")


def join(coordinator: str | None, processes: int | None, process: int | None) -> None:
    """Makes this process one of several, before anything is computed.

    Without arguments JAX finds the others on a TPU pod and under SLURM's `srun` and Open MPI's
    `mpirun`; elsewhere this process is alone.

    Args:
      coordinator: `host:port` of process 0, reachable from all.
      processes: How many there are; 1 alone for no others, wherever this runs.
      process: Which of them this is, from 0.

    Raises:
      ValueError: If some of the three are given and others missing, or they make no sense.
    """
    if processes == 1 and coordinator is None and process is None:
        return
    given = {"coordinator": coordinator, "num_processes": processes, "process_id": process}
    missing = [f"--{name}" for name, value in given.items() if value is None]
    if len(missing) == 3:
        try:
            jax.distributed.initialize()
        except ValueError as error:
            if "coordinator_address should be defined" not in str(error):
                raise
        return
    if coordinator is None or processes is None or process is None:
        raise ValueError(
            f"{', '.join(missing)} missing: give --coordinator, --num_processes and --process_id, "
            "or none of them, or --num_processes=1 alone"
        )
    if not 0 <= process < processes:
        raise ValueError(f"--process_id={process}: must be from 0 to {processes - 1}")
    if not coordinator.rpartition(":")[2].isdigit():
        raise ValueError(f"--coordinator={coordinator!r}: must be host:port, as 10.0.0.1:8476")
    # All is given, so there is nothing to detect: without this a Kubernetes pod warns.
    jax.distributed.initialize(
        coordinator, processes, process, cluster_detection_method="deactivate"
    )


def _end_without(error: BaseException) -> None:
    """Ends this process, since it has lost contact with another one."""
    # Which process it is, the coordinator says; of two it can only be the other.
    index, count = jax.process_index(), jax.process_count()
    named = re.search(r"task:(\d+)", str(error))
    number = str(1 - index) if count == 2 else named[1] if named else ""
    why = re.sub(r"(Error dispatching computation: )+", "", mistakes.one_line(str(error)))
    other = f"process {number}" if number else "another process"
    with contextlib.suppress(OSError, ValueError):
        print(
            f"process {index} of {count}: lost contact with {other} ({why[:200]}); if it has "
            "failed, it says why itself. Start all processes again with the same command: the run "
            "goes on from its last checkpoint",
            file=sys.stderr,
            flush=True,
        )
    os._exit(LOST)


def _is_lost_contact(error: BaseException) -> bool:
    """Tells whether JAX raised an error since another process does not answer."""
    words = ("Gloo", "Connection reset", "Connection closed", "UNAVAILABLE", "heartbeat", "NCCL")
    kinds = (jax.errors.JaxRuntimeError, TimeoutError)
    return isinstance(error, kinds) and any(word in str(error) for word in words)


@contextlib.contextmanager
def failing_together() -> Iterator[None]:
    """Ends a process that fails at once, and so the run: the others would wait for it for ever.

    They end with one sentence and the exit status 75, as soon as a collective tells them. If
    process 0 is gone, JAX's own client may notice before that: it ends a process by `abort` (status
    134), and a Python function cannot take its place. Then only its log tells of it.
    Not one that exits with a number: that is what all of them do, as when the run is done.
    """
    if jax.process_count() > 1:
        # Not with the stacks of all threads, which `faulthandler` would print.
        signal.signal(signal.SIGABRT, signal.SIG_DFL)
    try:
        yield
    except BaseException as error:
        exits = isinstance(error, SystemExit) and not isinstance(error.code, str)
        if jax.process_count() == 1 or exits:
            raise
        if _is_lost_contact(error):
            _end_without(error)
        print(f"process {jax.process_index()} of {jax.process_count()}:", file=sys.stderr, end=" ")
        found = mistakes.report(error)
        sys.stdout.flush()
        sys.stderr.flush()
        # At exit, JAX waits for all processes to arrive there.
        os._exit(found)


def is_first() -> bool:
    """Tells whether this process writes files and prints."""
    return jax.process_index() == 0


def first_does(action: Callable[[], T]) -> T | None:
    """Calls `action` on process 0 and returns its result; None elsewhere, once it is done.

    Raises:
      RuntimeError: Where `action` was not run, if it failed on process 0, which raises the error
        itself. It must not compute on arrays of all hosts: the others would not take part.
    """
    result, error = None, None
    if is_first():
        try:
            result = action()
        except Exception as raised:
            error = raised
    if jax.process_count() > 1:
        has_failed = multihost_utils.broadcast_one_to_all(np.bool_(error is not None))
        if has_failed and error is None:
            raise RuntimeError("process 0 failed; its message says why")
    if error is not None:
        raise error
    return result


def first_tells(action: Callable[[], T]) -> T:
    """Calls `action` on process 0 and returns its result, which must be JSON, on all.

    Raises:
      RuntimeError: As `first_does`.
    """
    if jax.process_count() == 1:
        return action()
    text = first_does(lambda: json.dumps(action()).encode()) or b""
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    data = np.frombuffer(text.ljust(size, b" "), np.uint8)
    received: T = json.loads(bytes(np.asarray(multihost_utils.broadcast_one_to_all(data))))
    return received


def check_shared(workdir: pathlib.Path) -> None:
    """Checks that all processes see one workdir: each looks for a file of process 0.

    Raises:
      ValueError: On all of them, if it is not.
    """
    if jax.process_count() == 1:
        return
    name = first_tells(lambda: f".seen-{secrets.token_hex(8)}")
    path = workdir / name
    first_does(lambda: path.write_text(name))
    deadline = time.monotonic() + PATIENCE
    while not (is_there := path.exists()) and time.monotonic() < deadline:
        time.sleep(0.1)  # a network file system may be a little late
    seen = np.asarray(multihost_utils.process_allgather(np.bool_(is_there))).reshape(-1)
    first_does(lambda: path.unlink(missing_ok=True))
    if not seen.all():
        others = ", ".join(str(i) for i in np.flatnonzero(~seen))
        raise ValueError(
            f"{workdir}: process {others} does not see there what process 0 has written; the "
            "workdir must be one directory that all processes see, on a file system that they share"
        )


def check_devices() -> None:
    """Checks that all processes have as many devices.

    Raises:
      ValueError: If they have not; it says how many each has.
    """
    counts = collections.Counter(device.process_index for device in jax.devices())
    if len(set(counts.values())) > 1:
        each = ", ".join(f"process {i}: {counts[i]}" for i in sorted(counts))
        raise ValueError(f"processes must have as many devices each, but there are {each}")


@contextlib.contextmanager
def first_enters(
    enter: Callable[[], contextlib.AbstractContextManager[T]], elsewhere: S
) -> Iterator[T | S]:
    """Enters a context on process 0, as `first_does`; the others get `elsewhere`."""
    with contextlib.ExitStack() as stack:
        entered = first_does(lambda: (stack.enter_context(enter()),))
        yield elsewhere if entered is None else entered[0]


def all_say(text: str) -> list[str]:
    """Exchanges a text between all processes, which all call it; returns all, in their order."""
    if jax.process_count() == 1:
        return [text]
    said = np.frombuffer(text.encode(), np.uint8)
    lengths = np.ravel(multihost_utils.process_allgather(np.int32(said.size)))
    padded = np.zeros(max(1, *lengths), np.uint8)
    padded[: said.size] = said
    heard = np.asarray(multihost_utils.process_allgather(padded)).reshape(len(lengths), -1)
    return [row[:n].tobytes().decode() for row, n in zip(heard, lengths, strict=True)]
