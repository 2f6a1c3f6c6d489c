import gc
import time

import pytest

from rigl_optax.training import config as config_lib

# Runs in a second: a tiny network on the digits, rewired every 10 steps.
SMALL = config_lib.Config(
    dataset="digits",
    data_dir="",
    validation_fraction=0.0,
    image_size=0,
    augment="none",
    loader_threads=1,
    model="lenet",
    hidden=(20, 10),
    width=1.0,
    dense_layers="default",
    compute_dtype="float32",
    model_options="",
    sequence_length=0,
    method="rigl",
    sparsity=0.8,
    distribution="erk",
    method_options="",
    ticket="",
    structure="",
    condensed=False,
    rewire_every=10,
    rewire_until=0.75,
    drop_fraction=0.3,
    prune_from=0.2,
    steps=60,
    batch_size=50,
    optimizer="sgd",
    learning_rate=0.1,
    schedule="cosine",
    warmup=0.0,
    decay_at=(),
    decay_factor=1.0,
    momentum=0.9,
    gradient_clip=0.0,
    weight_decay=1e-4,
    weight_decay_on="kernels",
    label_smoothing=0.0,
    seed=0,
    log_every=10,
    eval_every=20,
    eval_batch_size=128,
    checkpoint_every=20,
    keep_checkpoints=2,
    mesh_data=1,
    mesh_params=1,
    mesh_axes="auto",
    compare_at_rewirings=False,
    on_nonfinite="stop",
    max_rollbacks=10,
    max_bad_records=0,
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
