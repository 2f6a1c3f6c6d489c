"""Checkpoints that survive being killed, and the config they belong to.

Orbax writes into a temporary directory and renames it: a checkpoint is there as a
whole or not at all. Each holds the config of its run, which is in `config.json` as well, for
people and for programs that read a run. Nothing here executes what it reads.
"""

import contextlib
import dataclasses
import errno
import fcntl
import functools
import logging
import os
import pathlib
import sys
import time
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import IO, Any, TypeAlias

import jax
from orbax.checkpoint import v1 as ocp

from rigl_optax.training import config as config_lib
from rigl_optax.training import files, hosts
from rigl_optax.training.state import TrainState

PyTree = Any
PolicyCheckpointInfo: TypeAlias = Any  # with a `step`; Orbax names neither in public
PreservationContext: TypeAlias = Any
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_ECHOES = 0.2  # seconds in which what else fails after a failure comes back
CONFIG_FILE = "config.json"
RESULT_FILE = "result.json"
_CONFIG, _SPEED, _DATA = "config", "steps_per_second", "data"  # in the metadata of a checkpoint
_WILD = "*?["  # Orbax looks for its files by patterns, in which the path is not escaped


def check_path(workdir: pathlib.Path) -> None:
    """Raises a ValueError if checkpoints under this path could not be read again."""
    found = [letter for letter in _WILD if letter in str(workdir.absolute())]
    if found:
        raise ValueError(
            f"{workdir.absolute()}: a workdir must not have {' or '.join(map(repr, found))} in its "
            "path: its checkpoints could not be read again"
        )


def lock(workdir: pathlib.Path) -> IO[str]:
    """Takes the workdir for this process until the returned file is closed or the process ends.

    The lock is the kernel's: a killed run never blocks its own restart.

    Raises:
      RuntimeError: If another process trains in this workdir, or its lock is a link.
    """
    path = workdir / "lock"
    try:
        number = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise RuntimeError(f"{path} is a link, which is not followed; remove it") from None
    file = os.fdopen(number, "r+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise RuntimeError(f"{workdir}: another process is training in this workdir") from None
    return file


def check_claim(workdir: pathlib.Path, config: config_lib.Config) -> None:
    """Checks that a workdir is new, or that of the same run.

    Raises:
      ValueError: If a key that changes the numbers differs; it lists them all.
    """
    if (workdir / CONFIG_FILE).exists():
        _refuse_another(f"{workdir} holds a run", read_config(workdir), config)


def claim(workdir: pathlib.Path, config: config_lib.Config) -> None:
    """Writes the config into a workdir; raises as `check_claim` does."""
    check_claim(workdir, config)
    files.write(workdir / CONFIG_FILE, config_lib.to_json(config))


def _refuse_another(what: str, saved: Mapping[str, Any], config: config_lib.Config) -> None:
    changed = config_lib.differences(saved, config)
    if changed:
        raise ValueError(
            f"{what} with another config ({'; '.join(changed)}); resume it with its own config, "
            "or give another workdir"
        )


def read_config(workdir: pathlib.Path) -> dict[str, Any]:
    """Reads the config that `claim` wrote; `config.from_mapping` checks its keys.

    Raises:
      ValueError: If it is not there or not JSON.
    """
    return files.read(workdir / CONFIG_FILE, "the config of a run", {})


@dataclasses.dataclass
class _NewestAndBest(ocp.training.preservation_policies.PreservationPolicy):
    """Keeps the newest, and the best on the validation split; the newer of equals.

    And that of step 0: only runs that begin with weights from elsewhere have one.
    """

    newest: int
    ranks: Mapping[int, float]

    def should_preserve(
        self, checkpoints: Sequence[PolicyCheckpointInfo], *, context: PreservationContext
    ) -> Sequence[bool]:
        del context
        steps = [checkpoint.step for checkpoint in checkpoints]
        kept = {0, *sorted(steps)[-self.newest :], best(steps, self.ranks)}
        return [step in kept for step in steps]


def best(steps: Sequence[int], ranks: Mapping[int, float]) -> int | None:
    """Returns the step of the best checkpoint, the newer of equals; None if none was evaluated.

    Args:
      steps: Of the checkpoints.
      ranks: As in `open_checkpoints`; a checkpoint has the rank last measured when it was saved.
    """
    measured = []
    for step in steps:
        before = [done for done in ranks if done <= step]
        if before:
            measured.append((ranks[max(before)], step))
    return max(measured)[1] if measured else None


class Checkpoints:
    """The checkpoints of a workdir; from `open_checkpoints` or `read_checkpoints`.

    Close it, or use `with`.

    Attributes:
      directory: Where they are.
      reads_only: Whether they are opened for reading, beside a run that may be writing.
    """

    def __init__(
        self, directory: pathlib.Path, opened: ocp.training.Checkpointer | None, *, reads_only: bool
    ) -> None:
        self.directory = directory
        self.reads_only = reads_only
        self._opened = opened
        self._saving: Any = None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def checkpoints(self) -> Sequence[PolicyCheckpointInfo]:
        """All that are complete, the newest last; each has a `step`."""
        return [] if self._opened is None else self._opened.checkpoints

    def save(self, step: int, state: TrainState, about: dict[str, Any]) -> None:
        """Saves in the background, after the save before it; overwrites."""
        opened = self._writable()
        self._finish()
        self._saving = opened.save_async(
            step, state, force=True, overwrite=True, custom_metadata=about
        )

    def load(self, step: int, abstract: PyTree) -> PyTree:
        """Loads the state of a step, by this process alone: it waits for no other.

        Where one of several processes cannot read its part, Orbax would let the others wait
        for it until a time-out.
        """
        opened = self._there()
        if jax.process_count() == 1:
            return opened.load(step, abstract)
        alone, this = ocp.Context(), jax.process_index()
        alone.multiprocessing_options.primary_host = this
        alone.multiprocessing_options.active_processes = {this}
        with alone:
            return opened.load(step, abstract)

    def about(self, step: int) -> Mapping[str, Any]:
        """Returns what was saved beside the state of a step."""
        return self._there().checkpointables_metadata(step).custom_metadata or {}

    def reload(self) -> None:
        """Lists the checkpoints again, as another process may add and delete some."""
        if self._opened is not None:
            self._opened.reload()

    def delete(self, step: int) -> None:
        """Deletes the checkpoint of a step."""
        self._writable().delete(step)

    def wait(self) -> None:
        """Waits for the save under way; raises what it has raised."""
        self._finish()
        if self._opened is not None:
            self._opened.wait()

    def close(self) -> None:
        """Waits for the save under way, and gives back threads and files."""
        try:
            self._finish()
        finally:
            if self._opened is not None:
                self._opened.close()

    def _there(self) -> ocp.training.Checkpointer:
        if self._opened is None:
            raise ValueError(f"{self.directory} is not there")
        return self._opened

    def _writable(self) -> ocp.training.Checkpointer:
        if self.reads_only:
            raise ValueError(f"{self.directory} was opened for reading")
        return self._there()

    def _finish(self) -> None:
        """Asks for the result of the last save: only then Orbax ends its thread and event loop."""
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.result()


def open_checkpoints(
    workdir: pathlib.Path, keep: int, ranks: Mapping[int, float] | None = None
) -> Checkpoints:
    """Opens the checkpoints of a workdir for writing: the newest are kept, and the best.

    Only the process that holds the lock of the workdir may call it: a checkpoint that is half
    written is removed.

    Args:
      workdir: Of the run.
      keep: How many of the newest.
      ranks: `{step: rank}` of the evaluations on the validation split (`score.Score.rank`); may
        grow later. Not read from the checkpoints: a damaged one must not be in the way of the
        others.

    Raises:
      ValueError: As `check_path`.
    """
    check_path(workdir)
    directory = (workdir / "checkpoints").absolute()
    opened = ocp.training.Checkpointer(
        directory,
        preservation_policy=_NewestAndBest(keep, {} if ranks is None else ranks),
        cleanup_tmp_directories=True,
    )
    return Checkpoints(directory, opened, reads_only=False)


def read_checkpoints(workdir: pathlib.Path) -> Checkpoints:
    """Opens the checkpoints of a workdir for reading; a run may be training there meanwhile."""
    check_path(workdir)
    directory = (workdir / "checkpoints").absolute()
    opened = None
    if directory.is_dir():  # Orbax would make it
        opened = ocp.training.Checkpointer(directory, cleanup_tmp_directories=False)
    return Checkpoints(directory, opened, reads_only=True)


def save(
    checkpoints: Checkpoints,
    state: TrainState,
    config: config_lib.Config | None = None,
    steps_per_second: float = 0.0,
    data: Mapping[str, str] | None = None,
) -> None:
    """Saves in the background; the state may be donated right after.

    Waits for the save before it. Overwrites a checkpoint of this step: one can only be there
    if it could not be read, or was left by a run that was rolled back.

    Args:
      checkpoints: From `open_checkpoints`.
      state: To save.
      config: Of the run; kept in the checkpoint.
      steps_per_second: So far; kept likewise, for a run that has no step left to measure.
      data: Of `data_fingerprint.of`; kept likewise.
    """
    about: dict[str, Any] = {_SPEED: steps_per_second, _DATA: dict(data or {})}
    if config is not None:
        about[_CONFIG] = config_lib.to_json(config)
    checkpoints.save(int(state.step), state, about)


def steps_per_second(checkpoints: Checkpoints, step: int) -> float:
    """Returns the speed measured before a step was saved; 0 if there is no such checkpoint."""
    if all(checkpoint.step != step for checkpoint in checkpoints.checkpoints):
        return 0.0
    return float(checkpoints.about(step).get(_SPEED, 0.0))


def check_newest(checkpoints: Checkpoints, config: config_lib.Config) -> None:
    """Raises a ValueError if the newest checkpoint is of another config, listing the keys."""
    if found := checkpoints.checkpoints:
        _check_config(checkpoints, found[-1].step, config)


def _check_config(checkpoints: Checkpoints, step: int, config: config_lib.Config) -> None:
    try:
        saved = dict(checkpoints.about(step)[_CONFIG])
    except Exception:  # damaged, which reading the state will tell; or from before it was kept
        return
    _refuse_another(f"{checkpoints.directory}: checkpoint {step} is of a run", saved, config)


def _check_data(checkpoints: Checkpoints, step: int, data: Mapping[str, str]) -> None:
    try:
        saved = dict(checkpoints.about(step)[_DATA])
    except Exception:  # likewise
        return
    names = sorted(set(saved) | set(data)) if saved else []
    changed = [
        f"{name}: {saved.get(name)} -> {data.get(name)}"
        for name in names
        if saved.get(name) != data.get(name)
    ]
    if changed:
        raise ValueError(
            f"{checkpoints.directory}: checkpoint {step} is of a run on other data "
            f"({'; '.join(changed)}); resume it with its own data, or give another workdir"
        )


@contextlib.contextmanager
def explaining_failures(workdir: pathlib.Path) -> Iterator[None]:
    """Explains in one sentence that a file could not be written, as on a full disk.

    Raises:
      RuntimeError: Instead of what the writing of checkpoints raises then.
    """
    logger, hook = logging.getLogger("absl"), sys.excepthook
    logger.addFilter(_is_no_echo)
    sys.excepthook = functools.partial(_but_for_closed_loops, hook)
    try:
        yield
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None and not (isinstance(cause, OSError) and cause.errno in _FULL):
            cause = cause.__cause__ or cause.__context__
        words = [os.strerror(number) for number in _FULL]
        reasons = [str(cause)] if cause is not None else [w for w in words if w in str(error)]
        if not reasons:
            raise
        time.sleep(_ECHOES)
        raise RuntimeError(
            f"{workdir}: a file could not be written ({reasons[0].splitlines()[0][:200]}); "
            "checkpoints before it are intact, and the same command goes on from the newest"
        ) from error
    finally:
        logger.removeFilter(_is_no_echo)
        sys.excepthook = hook


def _is_no_echo(record: logging.LogRecord) -> bool:
    """Orbax logs the traceback of each of its threads that fails, and raises the error as well."""
    return not (record.exc_info and "orbax" in record.pathname)


def _but_for_closed_loops(
    hook: Callable[..., Any],
    kind: type[BaseException],
    error: BaseException,
    trace: types.TracebackType | None,
) -> None:
    """Prints all errors but those of work that Orbax has given up, whose event loop is closed."""
    if not (kind is RuntimeError and str(error) == "Event loop is closed"):
        hook(kind, error, trace)


def restore_newest(
    checkpoints: Checkpoints,
    like: TrainState,
    say: Callable[[str], None],
    config: config_lib.Config | None = None,
    until: int | None = None,
    data: Mapping[str, str] | None = None,
) -> TrainState | None:
    """Restores the newest state that can be read; None if there is no checkpoint.

    All processes call it and get the same: a checkpoint that one of them cannot read is passed
    over by all.

    Args:
      checkpoints: From `open_checkpoints` or `read_checkpoints`.
      like: A state of the same structure, shapes and shardings, as `Run.abstract`.
      say: Called with a line for each checkpoint that cannot be read.
      config: If given, the checkpoint must be of this config, but for keys that do not change the
        numbers.
      until: Later checkpoints are left alone, if given.
      data: If given, the checkpoint must be of a run on these data (`data_fingerprint.of`).

    Raises:
      ValueError: If there are checkpoints and none can be read, or one is of another config or
        other data: then it lists what differs.
    """
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like
    )
    # As process 0 sees them: with a shared disk others may see a new one later.
    seen = " ".join(
        str(c.step) for c in checkpoints.checkpoints if until is None or c.step <= until
    )
    found = [int(step) for step in hosts.all_say(seen)[0].split()]
    passed: list[int] = []
    for step in reversed(found):
        if config is not None:
            _check_config(checkpoints, step, config)
        if data is not None:
            _check_data(checkpoints, step, data)
        state, reason = None, ""
        try:
            state = checkpoints.load(step, abstract)
        except Exception as error:  # Orbax raises many kinds for files that are damaged
            reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        reasons = hosts.all_say(reason)
        if not any(reasons):
            return state
        if checkpoints.reads_only and not (checkpoints.directory / str(step)).is_dir():
            # The run that trains there has deleted it, and has newer ones.
            checkpoints.reload()
            return restore_newest(checkpoints, like, say, config, until, data)
        number, first = next(item for item in enumerate(reasons) if item[1])
        where = f" by process {number}" if len(reasons) > 1 else ""
        say(f"warning: checkpoint {step} cannot be read{where}, skipped: {first}")
        passed.append(step)
    if passed:
        raise ValueError(
            f"{checkpoints.directory}: none of the checkpoints {found} can be read"
            + ("" if checkpoints.reads_only else "; delete the directory to start again")
        )
    return None
