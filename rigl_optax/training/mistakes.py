"""Decides which errors are printed in one line: those that this package raises itself.

An error that Python, JAX or XLA raises is a bug or a fault of the machine, and keeps its traceback.
"""

import dis
import errno
import pathlib
import signal
import sys
import traceback
from types import FrameType

# Exit statuses: a run that failed; one that was asked for wrongly, which no second try will mend.
FAILED, MISTAKEN = 1, 2
INTERRUPTED = 128 + signal.SIGINT

_HOMES = tuple(
    pathlib.Path(__file__).resolve().parents[2] / n for n in ("rigl_optax", "rigl_optax_cli")
)
_RAISE = dis.opmap["RAISE_VARARGS"]
_PATHS = (
    *(errno.ENOENT, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.EEXIST),
    *(errno.EROFS, errno.ELOOP, errno.ENAMETOOLONG),
)


def status(error: BaseException) -> int | None:
    """Returns the exit status for an error whose message says all; None if it needs a traceback."""
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    if isinstance(error, OSError) and error.filename is not None and error.errno in _PATHS:
        return MISTAKEN
    if not _is_raised_here(error):
        return None
    if isinstance(error, ValueError | TypeError | FileNotFoundError):
        return MISTAKEN
    own = type(error).__module__.startswith("rigl_optax.")
    return FAILED if own or isinstance(error, RuntimeError) else None


def one_line(text: str) -> str:
    """Returns a text without its line breaks."""
    return " ".join(text.split())


def sentence(error: BaseException) -> str:
    """Returns the message of an error in one line."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    return one_line(str(error)) or type(error).__name__


def report(error: BaseException) -> int:
    """Prints an error, in one line where that is enough; returns its exit status."""
    found = status(error)
    if found is None:
        traceback.print_exception(error)
        return FAILED
    print(sentence(error), file=sys.stderr)
    return found


def _is_raised_here(error: BaseException) -> bool:
    """Tells whether a `raise` statement of this package raised it, not something it called."""
    last: tuple[FrameType, int] | None = None
    trace = error.__traceback__
    while trace is not None:
        last = (trace.tb_frame, trace.tb_lasti)
        trace = trace.tb_next
    if last is None:
        return False
    code, at = last[0].f_code, last[1]
    file = pathlib.Path(code.co_filename).resolve()
    return any(file.is_relative_to(home) for home in _HOMES) and code.co_code[at] == _RAISE
