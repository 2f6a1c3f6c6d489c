import dataclasses
import functools
import gc
import io
import pathlib
import time
from typing import Any, NamedTuple

import pytest
from rich.console import Console

from rigl_optax.training import checkpoints, evaluation, fingerprint, loop, setup, step
from rigl_optax.training import config as config_lib
from rigl_optax.training.state import TrainState

# Runs in a second: a tiny network on the digits, rewired every 10 steps.
SMALL = config_lib.from_mapping(
    {
        "steps": 60,
        "batch_size": 50,
        "data": {"name": "digits"},
        "model": {"name": "lenet", "hidden": (20, 10)},
        "method": {"name": "rigl", "sparsity": 0.8, "every": 10},
        "optimizer": {"name": "sgd", "momentum": 0.9, "nesterov": True, "weight_decay": 1e-4},
        "mesh": {"data": 1},
        "log": {"every": 10},
        "eval": {"every": 20, "batch_size": 128},
        "checkpoint": {"every": 20},
    }
)


@pytest.fixture(scope="session")
def small():
    return SMALL


@pytest.fixture(scope="session")
def vision():
    """A wide ResNet as small as one can be, on digits."""
    return config_lib.changed(
        SMALL,
        {
            "model.name": "wide_resnet",
            "model.depth": 10,
            "model.k": 1,
            "model.dropout": 0.1,
            "model.hidden": (),
            "model.width": 0.25,
            "data.augment": "pad_crop",
            "batch_size": 20,
            "steps": 20,
            "method.every": 5,
            "method.sparsity": 0.7,
            "loss.label_smoothing": 0.1,
        },
    )


@pytest.fixture(scope="module")
def shared_programs():
    """Runs of one config have one train step, one evaluator and one draw, compiled once.

    For modules that train the same config again and again. Each run still has its own state, and
    reads what was saved; that other processes compile the same is for `test_kill.py` to show.
    """
    prepare = functools.cache(setup.prepare)

    def shared(make):
        made = {}

        @functools.wraps(make)
        def remembered(run, **keys):
            key = (run.draw, *keys.items())  # `draw` is what copies of a run have in common
            if key not in made:
                made[key] = make(run, **keys)
            return made[key]

        return remembered

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setup, "prepare", lambda config: dataclasses.replace(prepare(config)))
        patch.setattr(step, "make_train_step", shared(step.make_train_step))
        patch.setattr(evaluation, "evaluator", shared(evaluation.evaluator))
        patch.setattr(fingerprint, "comparer", shared(fingerprint.comparer))
        yield


class Trained(NamedTuple):
    """A finished run, and its state as restored from its last checkpoint."""

    config: config_lib.Config
    workdir: pathlib.Path
    result: dict[str, Any]
    run: setup.Run
    state: TrainState


@pytest.fixture(scope="session")
def trained_vision(vision, tmp_path_factory):
    """The wide ResNet, trained once for all modules that look at it."""
    workdir = tmp_path_factory.mktemp("vision")
    result = loop.train(vision, workdir, Console(file=io.StringIO(), width=120))
    run = setup.prepare(vision)
    with checkpoints.read_checkpoints(workdir) as saved:
        state = checkpoints.restore_newest(saved, run.abstract, print)
    return Trained(vision, workdir, result, run, state)


@pytest.fixture
def settled():
    """What Orbax has given up ends within the test that may ignore it."""
    yield
    for _ in range(3):
        time.sleep(0.1)
        gc.collect()
