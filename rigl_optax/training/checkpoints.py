"""Checkpoints that survive being killed, and the config they belong to.

Orbax writes into a temporary directory and renames it: a checkpoint is there as a
whole or not at all. Nothing here executes what it reads.
"""

import contextlib
import dataclasses
import errno
import fcntl
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import IO, Any, TypeAlias

import jax
from orbax.checkpoint import v1 as ocp

from rigl_optax.training import config as config_lib
from rigl_optax.training import files
from rigl_optax.training.state import TrainState

Checkpoints: TypeAlias = ocp.training.Checkpointer
PolicyCheckpointInfo: TypeAlias = Any  # with a `step`; Orbax names neither in public
PreservationContext: TypeAlias = Any
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
CONFIG_FILE = "config.json"
RESULT_FILE = "result.json"


def lock(workdir: pathlib.Path) -> IO[str]:
    """Takes the workdir for this process until the returned file is closed or the process ends.

    The lock is the kernel's: a killed run never blocks its own restart.

    Raises:
      RuntimeError: If another process trains in this workdir.
    """
    file = (workdir / "lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise RuntimeError(f"{workdir}: another process is training in this workdir") from None
    return file


def claim(workdir: pathlib.Path, config: config_lib.Config) -> None:
    """Writes the config into a new workdir; in a used one, checks that it is the same run.

    Raises:
      ValueError: If a key that changes the numbers differs; it lists them all.
    """
    path = workdir / CONFIG_FILE
    if path.exists():
        saved = read_config(workdir)
        changed = config_lib.differences(saved, config)
        if changed:
            raise ValueError(
                f"{workdir} holds a run with another config ({'; '.join(changed)}); resume it with "
                "its own config, or give another workdir"
            )
    files.write(path, config_lib.to_json(config))


def read_config(workdir: pathlib.Path) -> dict[str, Any]:
    """The config that `claim` wrote, or wrote with other keys; `config.from_mapping` checks those.

    Raises:
      ValueError: If it is not there or not JSON.
    """
    return files.read(workdir / CONFIG_FILE, "the config of a run", {})


@dataclasses.dataclass
class _NewestAndBest(ocp.training.preservation_policies.PreservationPolicy):
    """Keeps the newest, and the best on the validation split; the newer of equals."""

    newest: int
    ranks: Mapping[int, float]

    def should_preserve(
        self, checkpoints: Sequence[PolicyCheckpointInfo], *, context: PreservationContext
    ) -> Sequence[bool]:
        del context
        steps = [checkpoint.step for checkpoint in checkpoints]
        kept = set(sorted(steps)[-self.newest :])
        measured = [(self._rank(s), s) for s in steps if self._rank(s) is not None]
        if measured:
            kept.add(max(measured)[1])
        return [step in kept for step in steps]

    def _rank(self, step: int) -> float | None:
        """As last measured when that step was saved."""
        before = [measured for measured in self.ranks if measured <= step]
        return self.ranks[max(before)] if before else None


def open_checkpoints(
    workdir: pathlib.Path, keep: int, ranks: Mapping[int, float] | None = None
) -> Checkpoints:
    """The checkpoints of a workdir: the newest are kept, and the best.

    Close it, or use `with`.

    Args:
      workdir: Of the run.
      keep: How many of the newest.
      ranks: How good it was on the validation split (`score.Score.rank`), by the updates done; may
        grow later. Kept apart from the checkpoints: one with a damaged
        file of its own must not be in the way of the others.
    """
    return Checkpoints(
        (workdir / "checkpoints").absolute(),
        preservation_policy=_NewestAndBest(keep, {} if ranks is None else ranks),
        cleanup_tmp_directories=True,
    )


def read_checkpoints(workdir: pathlib.Path) -> Checkpoints:
    """The checkpoints of a workdir in which a run may be training: nothing is cleaned up."""
    return Checkpoints((workdir / "checkpoints").absolute(), cleanup_tmp_directories=False)


def save(checkpoints: Checkpoints, state: TrainState) -> None:
    """Saves in the background; the state may be donated right after.

    Waits for the save before it. Overwrites a checkpoint of this step: one can only be there
    if it could not be read, or was left by a run that was rolled back.
    """
    checkpoints.save_async(int(state.step), state, force=True, overwrite=True)


@contextlib.contextmanager
def told_of_failures(workdir: pathlib.Path) -> Iterator[None]:
    """Says in one sentence that a file could not be written, as on a full disk.

    Raises:
      RuntimeError: Instead of what the writing of checkpoints raises then.
    """
    try:
        yield
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None and not (isinstance(cause, OSError) and cause.errno in _FULL):
            cause = cause.__cause__ or cause.__context__
        words = [os.strerror(number) for number in _FULL]
        if cause is None and not any(word in str(error) for word in words):
            raise
        reason = str(cause or error).splitlines()[0][:200]
        raise RuntimeError(
            f"{workdir}: a file could not be written ({reason}); "
            "checkpoints before it are intact, and the same command goes on from the newest"
        ) from error


def restore_newest(
    checkpoints: Checkpoints, like: TrainState, say: Callable[[str], None]
) -> TrainState | None:
    """The newest state that can be read, placed as `like` is; None if there is no checkpoint.

    Args:
      checkpoints: From `open_checkpoints`.
      like: A state of the same structure, shapes and shardings.
      say: Told about each checkpoint that had to be passed over.

    Raises:
      ValueError: If there are checkpoints and none can be read.
    """
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like
    )
    found = checkpoints.checkpoints
    for checkpoint in reversed(found):
        try:
            return checkpoints.load(checkpoint.step, abstract)
        except Exception as error:  # Orbax raises many kinds for files that are damaged
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            say(f"warning: checkpoint {checkpoint.step} cannot be read, skipped: {reason[:200]}")
    if found:
        raise ValueError(
            f"{checkpoints.directory}: none of the checkpoints "
            f"{[c.step for c in found]} can be read; delete the directory to start again"
        )
    return None
