"""Checkpoints that survive being killed, and the config they belong to.

Orbax writes into a temporary directory and renames it: a checkpoint is there as a
whole or not at all. Nothing here executes what it reads.
"""

import fcntl
import json
import os
import pathlib
from collections.abc import Callable
from typing import IO, Any, TypeAlias

import jax
from orbax.checkpoint import v1 as ocp

from rigl_optax.training import config as config_lib
from rigl_optax.training.state import TrainState

Checkpoints: TypeAlias = ocp.training.Checkpointer
CONFIG_FILE = "config.json"


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


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes a JSON file at once: a reader sees the old content or the new."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w") as file:
        json.dump(value, file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


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
    write_json(path, config_lib.to_json(config))


def read_config(workdir: pathlib.Path) -> dict[str, Any]:
    """The config that `claim` wrote.

    Raises:
      ValueError: If it is not there or not JSON.
    """
    path = workdir / CONFIG_FILE
    try:
        saved = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not the config of a run ({error})") from error
    if not isinstance(saved, dict):
        raise ValueError(f"{path}: not the config of a run (a JSON {type(saved).__name__})")
    return saved


def open_checkpoints(workdir: pathlib.Path, keep: int) -> Checkpoints:
    """The checkpoints of a workdir; the newest `keep` are kept. Close it, or use `with`."""
    return Checkpoints(
        (workdir / "checkpoints").absolute(),
        preservation_policy=ocp.training.preservation_policies.LatestN(keep),
        cleanup_tmp_directories=True,
    )


def read_checkpoints(workdir: pathlib.Path) -> Checkpoints:
    """The checkpoints of a workdir in which a run may be training: nothing is cleaned up."""
    return Checkpoints((workdir / "checkpoints").absolute(), cleanup_tmp_directories=False)


def save(checkpoints: Checkpoints, state: TrainState) -> None:
    """Saves in the background; the state may be donated right after.

    Waits for the save before it. Overwrites a checkpoint of this step: one can only be there
    if it could not be read.
    """
    checkpoints.save_async(int(state.step), state, force=True, overwrite=True)


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
