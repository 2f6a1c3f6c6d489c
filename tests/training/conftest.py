import gc
import time

import pytest

from rigl_optax.training import config as config_lib

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


@pytest.fixture
def settled():
    """What Orbax has given up ends within the test that may ignore it."""
    yield
    for _ in range(3):
        time.sleep(0.1)
        gc.collect()
