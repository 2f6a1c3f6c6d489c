"""Restores runs from their workdirs, without their data or their initial weights."""

import pathlib
from collections.abc import Callable

from rigl_optax.training import checkpoints, files, mesh, metrics, setup, tasks
from rigl_optax.training import config as config_lib
from rigl_optax.training.state import TrainState

NEWEST, BEST = "newest", "best"
FACTS_FILE = "dataset.json"
_FACTS: files.Form = {
    "image_shape": [(int,)],
    "classes": (int,),
    "maximum": files.NUMBER,
    "mean": [files.NUMBER],
    "deviation": [files.NUMBER],
}


def load(
    workdir: str | pathlib.Path, step: str | int = NEWEST, say: Callable[[str], None] = print
) -> tuple[setup.Run, TrainState]:
    """Restores a run, finished or still training, from its workdir alone.

    Neither the dataset nor the initial weights are needed: shapes follow from the config and from
    a few facts that the workdir keeps. `run.dataset` reads the data when it is first asked for.
    The state is on the devices that are here, whatever mesh it was trained on. Nothing is written.

    Args:
      workdir: Of the run.
      step: `newest`, the newest checkpoint that can be read; `best`, the best on the validation
        split; or the step of a checkpoint.
      say: Called with a line for each checkpoint that cannot be read and is passed over.

    Returns:
      The run and its state: `state.params`, `state.opt_state`, ...; the model is
      `nnx.merge(run.graphdef, state.params, state.model_state)`.

    Raises:
      ValueError: If there is no run, or no such checkpoint, or it cannot be read; it lists those
        there are.

    Examples:
      Evaluates the best checkpoint of a run on the test split::

        from rigl_optax import training
        from rigl_optax.training import evaluation

        run, state = training.load("runs/digits", "best")
        print(evaluation.evaluator(run)(state, run.dataset.test)["accuracy"])
    """
    folder = pathlib.Path(workdir)
    run = read_run(folder)
    return run, restore(run, folder, step, say)


def read_run(workdir: pathlib.Path, on: config_lib.Mesh | None = None) -> setup.Run:
    """Prepares the run of a workdir from its config and the facts of its data.

    Args:
      workdir: Of the run.
      on: The mesh to be on; by default that of the run, or one device if it does not fit here.

    Raises:
      ValueError: If there is no run, or its files are damaged.
    """
    config = config_lib.from_mapping(checkpoints.read_config(workdir))
    if on is None:
        config = mesh.fitting(config)
    else:
        config = config_lib.changed(config, {"mesh": config_lib.to_json(on)})
    return setup.outline(config, read_facts(workdir))


def restore(
    run: setup.Run,
    workdir: pathlib.Path,
    step: str | int = NEWEST,
    say: Callable[[str], None] = print,
) -> TrainState:
    """Restores the state in a checkpoint of a run, which may be training.

    Args:
      run: The run.
      workdir: Of the run.
      step: As in `load`.
      say: As in `load`.

    Raises:
      ValueError: If there is no such checkpoint, or it cannot be read; it lists those there are.
    """
    which = str(step)
    if not (workdir / "checkpoints").exists():
        raise ValueError(f"{workdir} has no checkpoint yet")
    with checkpoints.read_checkpoints(workdir) as saved:
        steps = [checkpoint.step for checkpoint in saved.checkpoints]
        number: int | None = None
        if which == BEST:
            number = checkpoints.best(steps, ranks(run, metrics.read(workdir / metrics.FILE)))
        elif which.isdecimal():
            number = int(which)
        if which != NEWEST and number not in steps:
            raise ValueError(
                f"step={which}: must be {NEWEST}, {BEST} (if there are validation records) or a "
                f"step of the checkpoints, which are {steps}"
            )
        state = checkpoints.restore_newest(saved, run.abstract, say, run.config, until=number)
    if state is None:
        raise ValueError(f"{workdir} has no checkpoint yet")
    if number is not None and int(state.step) != number:
        raise ValueError(f"step={which}: checkpoint {number} cannot be read")
    return state


def first(
    run: setup.Run, saved: checkpoints.Checkpoints, say: Callable[[str], None] = print
) -> TrainState:
    """Returns the state at step 0: that which a run of `config.start` has saved, or drawn.

    Args:
      run: The run.
      saved: Its checkpoints.
      say: As in `load`.

    Raises:
      ValueError: If the saved one cannot be read.
    """
    found = checkpoints.restore_newest(saved, run.abstract, say, run.config, until=0)
    return run.draw() if found is None else found


def ranks(run: setup.Run, records: metrics.Records) -> dict[int, float]:
    """Ranks each evaluation on the validation split: `{step: rank}`, higher where it was better."""
    score = run.task.score
    measured = metrics.recorded(records, "validation", score.key)
    return {step: score.rank({score.key: value}) for step, value in measured.items()}


def write_facts(workdir: pathlib.Path, facts: tasks.Facts) -> None:
    """Writes into a workdir what a model has to know of the data."""
    files.write(workdir / FACTS_FILE, facts._asdict())


def read_facts(workdir: pathlib.Path) -> tasks.Facts:
    """Reads what `write_facts` wrote.

    Raises:
      ValueError: If it is not there, or damaged.
    """
    found = files.read(workdir / FACTS_FILE, "the facts of a dataset", _FACTS)
    return tasks.Facts(
        tuple(found["image_shape"]),
        found["classes"],
        found["maximum"],
        tuple(found["mean"]),
        tuple(found["deviation"]),
    )
