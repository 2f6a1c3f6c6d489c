"""Checkpoints that survive being killed, and the config they belong to.

Orbax writes into a temporary directory and renames it: a checkpoint is there as a
whole or not at all. Each holds the config of its run, which is in `config.json` as well, for
people and for what looks at a run from outside. Nothing here executes what it reads.
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
_CONFIG, _SPEED = "config", "steps_per_second"  # in the metadata of a checkpoint


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
        kept = {*sorted(steps)[-self.newest :], best(steps, self.ranks)}
        return [step in kept for step in steps]


def best(steps: Sequence[int], ranks: Mapping[int, float]) -> int | None:
    """The step of the best checkpoint, the newer of equals; None if none has been measured.

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


def save(
    checkpoints: Checkpoints,
    state: TrainState,
    config: config_lib.Config | None = None,
    steps_per_second: float = 0.0,
) -> None:
    """Saves in the background; the state may be donated right after.

    Waits for the save before it. Overwrites a checkpoint of this step: one can only be there
    if it could not be read, or was left by a run that was rolled back.

    Args:
      checkpoints: From `open_checkpoints`.
      state: To save.
      config: Of the run; kept in the checkpoint.
      steps_per_second: So far; kept likewise, for a run that has no step left to measure.
    """
    about: dict[str, Any] = {_SPEED: steps_per_second}
    if config is not None:
        about[_CONFIG] = config_lib.to_json(config)
    checkpoints.save_async(
        int(state.step), state, force=True, overwrite=True, custom_metadata=about
    )


def steps_per_second(checkpoints: Checkpoints, step: int) -> float:
    """What was measured before a step was saved; 0 if there is no such checkpoint, or it is old."""
    if all(checkpoint.step != step for checkpoint in checkpoints.checkpoints):
        return 0.0
    return float(_about(checkpoints, step).get(_SPEED, 0.0))


def check_newest(checkpoints: Checkpoints, config: config_lib.Config) -> None:
    """Raises a ValueError if the newest checkpoint is of another config, listing the keys."""
    if found := checkpoints.checkpoints:
        _check_config(checkpoints, found[-1].step, config)


def _check_config(checkpoints: Checkpoints, step: int, config: config_lib.Config) -> None:
    try:
        saved = dict(_about(checkpoints, step)[_CONFIG])
    except Exception:  # damaged, which reading the state will tell; or from before it was kept
        return
    _refuse_another(f"{checkpoints.directory}: checkpoint {step} is of a run", saved, config)


def _about(checkpoints: Checkpoints, step: int) -> Mapping[str, Any]:
    return checkpoints.checkpointables_metadata(step).custom_metadata or {}


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
    checkpoints: Checkpoints,
    like: TrainState,
    say: Callable[[str], None],
    config: config_lib.Config | None = None,
    until: int | None = None,
) -> TrainState | None:
    """The newest state that can be read, placed as `like` is; None if there is no checkpoint.

    Args:
      checkpoints: From `open_checkpoints`.
      like: A state of the same structure, shapes and shardings.
      say: Told about each checkpoint that had to be passed over.
      config: Which the checkpoint must be of, as far as it changes the numbers, if given.
      until: Later checkpoints are left alone, if given.

    Raises:
      ValueError: If there are checkpoints and none can be read, or one is of another config: then
        it lists the keys.
    """
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like
    )
    found = [c for c in checkpoints.checkpoints if until is None or c.step <= until]
    for checkpoint in reversed(found):
        if config is not None:
            _check_config(checkpoints, checkpoint.step, config)
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
