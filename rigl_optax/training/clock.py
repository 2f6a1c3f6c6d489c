"""Measures steps per second, without the time that compiling takes."""

import time
from typing import Any

import jax


class Clock:
    """Times the steps of a run; the first call of each compiled program is left out."""

    def __init__(self, start: int, measured_before: float) -> None:
        """Starts before the first step.

        Args:
          start: Steps done already.
          measured_before: Steps per second, for as long as no step has been timed.
        """
        self._start, self._measured_before = start, measured_before
        self._began = time.monotonic()
        self._programs: set[Any] = set()
        self._stopped: float | None = None

    def before(self, program: Any, state: Any) -> None:
        """Stops the clock at the first call of a program, once all steps before it are done."""
        if program in self._programs:
            return
        jax.block_until_ready(state)
        self._stopped = time.monotonic() if self._programs else self._began
        self._programs.add(program)

    def after(self, state: Any) -> None:
        """Lets a stopped clock go on, once the step is done and so the program is compiled."""
        if self._stopped is None:
            return
        jax.block_until_ready(state)
        self._began += time.monotonic() - self._stopped
        self._stopped = None

    def steps_per_second(self, done: int) -> float:
        """Returns the rate after so many steps in all."""
        timed = done - self._start - len(self._programs)
        return timed / (time.monotonic() - self._began) if timed > 0 else self._measured_before
