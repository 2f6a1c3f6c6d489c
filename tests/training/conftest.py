import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from rigl_optax.training import config as config_lib

# Runs in a second: a tiny network on the digits, rewired every 10 steps.
SMALL = config_lib.Config(
    dataset="digits",
    data_dir="",
    model="lenet",
    hidden=(20, 10),
    model_options="",
    sequence_length=0,
    method="rigl",
    sparsity=0.8,
    distribution="erk",
    method_options="",
    ticket="",
    structure="",
    rewire_every=10,
    rewire_until=0.75,
    drop_fraction=0.3,
    steps=60,
    batch_size=50,
    optimizer="sgd",
    learning_rate=0.1,
    schedule="cosine",
    momentum=0.9,
    gradient_clip=0.0,
    weight_decay=1e-4,
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
    max_bad_records=0,
)


@pytest.fixture(scope="session")
def small():
    return SMALL


@pytest.fixture(autouse=True, scope="session")
def _compile_once(tmp_path_factory):
    """Runs of one config share their compiled functions; most of the tests' time is compilation."""
    options = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0.1,
    }
    before = {name: getattr(jax.config, name) for name in options}
    for values in (options, before):
        compilation_cache.reset_cache()  # JAX decides about the cache at the first compilation
        for name, value in values.items():
            jax.config.update(name, value)
        if values is options:
            yield
