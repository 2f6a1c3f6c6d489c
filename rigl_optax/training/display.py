"""Shows the progress of a run: a live bar in a terminal, plain lines elsewhere."""

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from typing import IO, Any

from rich import progress
from rich.console import Console

Show = Callable[[int, str], None]
PLAIN_EVERY = 10.0  # seconds between plain lines; the first and the last are always shown


def make_console() -> Console:
    """Makes a console on standard output, as wide as the terminal, or wide enough without one."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=120)


class _Outliving:
    """A file for output that goes on when its reader is gone, or its disk full: into nothing."""

    def __init__(self, file: IO[str]) -> None:
        self._file = file
        self._is_gone = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def write(self, text: str) -> int:
        """Writes what can be written."""
        return self._try(lambda: self._file.write(text), len(text))

    def flush(self) -> None:
        """Flushes what can be flushed."""
        self._try(self._file.flush, None)

    def _try(self, action: Callable[[], Any], otherwise: Any) -> Any:
        if self._is_gone:
            return otherwise
        try:
            return action()
        except (OSError, ValueError):  # ValueError: closed
            self._is_gone = True
            _into_nothing(self._file)
            return otherwise


def _into_nothing(file: IO[str]) -> None:
    """Redirects a file to nowhere, so that what waits in its buffer no longer fails."""
    with contextlib.suppress(OSError, ValueError):
        nothing = os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(nothing, file.fileno())
        finally:
            os.close(nothing)


def outlive_reader(console: Console) -> None:
    """Makes a console print nothing from then on when its output can no longer be written.

    Rich would end the process instead, in the middle of a step.
    """
    if not isinstance(console.file, _Outliving):
        console.file = _Outliving(console.file)  # type: ignore[assignment]


@contextlib.contextmanager
def training_progress(console: Console, start: int, steps: int) -> Iterator[Show]:
    """Yields a function `show(step, text)` to call with the loss and accuracy so far.

    Args:
      console: Where to; a live bar if it is a terminal, else a line every 10 s.
      start: The step the run starts or goes on from.
      steps: The last step.

    Yields:
      The function; `text` holds loss and accuracy.
    """
    first: tuple[int, float] | None = None  # of the first call: compilation is over by then

    def speed(step: int) -> float:
        nonlocal first
        if first is None:
            first = (step, time.monotonic())
        return (step - first[0]) / max(time.monotonic() - first[1], 1e-9)

    def with_speed(step: int, text: str) -> str:
        pace = speed(step)
        return f"{text}  {pace:.0f} steps/s" if pace else text

    if console.is_terminal:
        columns = (
            progress.BarColumn(bar_width=10),  # all of it fits into 80 characters
            progress.MofNCompleteColumn(),
            progress.TextColumn("{task.description}"),
            progress.TimeRemainingColumn(compact=True),
            progress.TextColumn("left"),
        )
        with progress.Progress(*columns, console=console) as bar:
            task = bar.add_task("compiling", total=steps, completed=start)
            yield lambda step, text: bar.update(
                task, completed=step, description=with_speed(step, text)
            )
        return

    last = time.monotonic() - PLAIN_EVERY

    def line(step: int, text: str) -> None:
        nonlocal last
        text, pace = with_speed(step, text), speed(step)
        if step < steps and time.monotonic() - last < PLAIN_EVERY:
            return
        last = time.monotonic()
        rest = f"  {(steps - step) / pace:.0f} s left" if pace else ""
        console.print(f"step {step}/{steps}  {text}{rest}")

    yield line
