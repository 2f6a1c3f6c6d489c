"""Being asked to stop: the step that is being taken is finished and saved first."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

import jax
from jax.experimental import multihost_utils

# What a shell reports of a process that SIGTERM ended: schedulers start such a run again.
STOPPED = 128 + signal.SIGTERM
Stop = Callable[[int], bool]


@contextlib.contextmanager
def asked_to_stop() -> Iterator[Stop]:
    """A function to ask after every step, with the updates done: whether to save and stop.

    Alone, a process listens to SIGTERM itself, and is ended by a second one at once. Several
    agree on a step through JAX's preemption service, which listens for them.
    """
    if jax.process_count() > 1:
        yield multihost_utils.reached_preemption_sync_point
        return
    asked = False

    def remember(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        asked = True
        signal.signal(signal.SIGTERM, before)

    if threading.current_thread() is not threading.main_thread():
        yield lambda done: False  # only the main thread can listen
        return
    before = signal.signal(signal.SIGTERM, remember)
    try:
        yield lambda done: asked
    finally:
        signal.signal(signal.SIGTERM, before)


class StoppedError(Exception):
    """A run was asked to stop, and has saved what it had done."""
