"""Stops a run on request: the step that is being taken is finished and saved first."""

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Collection, Iterator

import jax
from jax.experimental import multihost_utils

# What a shell reports of a process that SIGTERM ended: schedulers start such a run again.
STOPPED = 128 + signal.SIGTERM
Stop = Callable[[int], int]


@contextlib.contextmanager
def asked_to_stop() -> Iterator[Stop]:
    """Yields a function to ask after every step, with the updates done, whether to save and stop.

    It returns the exit status to stop with, or 0 to go on. Alone, a process listens to SIGTERM and
    to Ctrl-C (SIGINT), and a second one of either ends it at once, also in the middle of a
    compilation. Several agree on a step through JAX's preemption service, which listens to SIGTERM;
    Ctrl-C at one of them asks all.
    """
    several = jax.process_count() > 1
    with contextlib.ExitStack() as stack:
        found: list[int] = []
        if threading.current_thread() is threading.main_thread():  # no other one can listen
            numbers = (signal.SIGINT,) if several else (signal.SIGINT, signal.SIGTERM)
            found = stack.enter_context(_listening(numbers, hands_on=several))

        def stop(done: int) -> int:
            if several:
                return STOPPED * multihost_utils.reached_preemption_sync_point(done)
            return 128 + found[0] if found else 0

        yield stop


@contextlib.contextmanager
def _listening(numbers: Collection[int], *, hands_on: bool) -> Iterator[list[int]]:
    """Yields a list that gets the number of the first of these signals; a second ends the process.

    Python runs a handler only between two of its own instructions, of which there are none while
    XLA compiles. So a thread reads the numbers as they arrive.

    Args:
      numbers: Of the signals; one that is ignored, as by `nohup`, stays so.
      hands_on: Whether this process is to get a SIGTERM in turn.
    """
    found: list[int] = []
    reader, writer = socket.socketpair()
    writer.setblocking(False)

    def listen() -> None:
        while received := reader.recv(1):
            number = received[0]
            if number not in numbers:
                continue
            if found:
                os._exit(128 + number)
            found.append(number)
            with contextlib.suppress(OSError, ValueError):  # nobody may be reading any more
                print(
                    "asked to stop: finishing the step and saving; once more to end at once",
                    file=sys.stderr,
                    flush=True,
                )
            if hands_on:
                os.kill(os.getpid(), signal.SIGTERM)

    before = {n: signal.getsignal(n) for n in numbers}
    heard = [n for n, handler in before.items() if handler is not signal.SIG_IGN]
    for number in heard:
        signal.signal(number, lambda number, frame: None)
    fd = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    thread = threading.Thread(target=listen, name="signals", daemon=True)
    thread.start()
    try:
        yield found
    finally:
        signal.set_wakeup_fd(fd)
        for number in heard:
            signal.signal(number, before[number])
        writer.close()
        thread.join()
        reader.close()


class StoppedError(Exception):
    """A run was asked to stop, and has saved the steps it had done.

    Attributes:
      status: The exit status that says so.
    """

    def __init__(self, message: str = "", status: int = STOPPED) -> None:
        super().__init__(message)
        self.status = status
