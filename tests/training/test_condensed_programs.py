"""The compiled steps of condensed runs: ordinary ones and rewirings, with nothing dense in them."""

import math
import re

import jax
import numpy as np
import pytest

from rigl_optax.training import config as config_lib
from rigl_optax.training import representation, setup, step
from tests.training import condensed_runs as runs
from tests.training.condensed_runs import GRU, LENET, MOBILENET, WIDE_RESNET

slow = pytest.mark.slow

# One kernel of each is condensed, or one of each gate: larger than all activations, a tile of 256
# pixels of them included, and than all other layers.
LARGE = {
    "lenet": config_lib.changed(
        LENET,
        {
            "model.hidden": (256, 208),
            "model.dense_layers": "layers/[02]",
            "method.structure": {"name": "block", "rows": 16, "cols": 16},
            "batch_size": 8,
            "method.sparsity": 0.9,
        },
    ),
    "wide_resnet": config_lib.changed(
        WIDE_RESNET,
        {
            "model.depth": 10,
            "model.k": 2,
            "model.width": 1.0,
            "model.dense_layers": "^(?!blocks/2/conv2)",
            "method.structure": {"name": "block", "rows": 8, "cols": 8},
            "batch_size": 2,
            "method.sparsity": 0.9,
        },
    ),
    "mobilenet_v1": config_lib.changed(
        MOBILENET,
        {
            "model.width": 4.0,
            "model.dense_layers": "^(?!blocks/2/pointwise/)",
            "method.structure": {"name": "block", "rows": 16, "cols": 16},
            "batch_size": 2,
            "method.sparsity": 0.9,
        },
    ),
    "gru": config_lib.changed(
        GRU,
        {
            "model.hidden": (256,),
            "model.embedding": 32,
            "model.readout": (32,),
            "model.fused": False,
            "model.dense_layers": "layers/0/input|readout",
            "method.structure": {"name": "block", "rows": 16, "cols": 16},
            "batch_size": 2,
            "method.sparsity": 0.9,
        },
    ),
}
# Its gates are one kernel, of which no single one may be there either.
LARGE["gru-fused"] = config_lib.changed(
    LARGE["gru"], {"model.embedding": 32, "model.readout": (32,)}
)
SHOWN = [pytest.param(kind, marks=() if kind == "lenet" else slow) for kind in LARGE]


def start(config, run):
    return jax.tree.map(lambda x: x.copy(), run.initial)._replace(history=None)


def batch_of(config, run, at):
    device = jax.sharding.NamedSharding(run.placement.mesh, jax.sharding.PartitionSpec())
    return jax.device_put(run.task.training_batch(config, at), device)


@pytest.fixture(scope="module", params=SHOWN)
def compiled(request):
    """Config, run, and both compiled programs by whether they rewire."""
    with pytest.MonkeyPatch.context() as patch:
        runs.shorten(patch)
        config = LARGE[request.param]
        run = setup.prepare(config)
        given = start(config, run), batch_of(config, run, 0)
        takes = runs.programs(run)
        yield config, run, {r: take.lower(*given).compile() for r, take in takes.items()}


def largest(program):
    shapes = re.findall(r"[a-z]\d*\[([\d,]+)\]", program.as_text())
    return max(math.prod(map(int, dims.split(","))) for dims in shapes)


def test_there_is_no_array_of_the_size_of_a_condensed_kernel(compiled):
    _, run, programs = compiled
    kernels = {p: math.prod(t.shape) for p, t in run.initial.opt_state.topologies.items()}
    others = [leaf.size for leaf in jax.tree.leaves(run.initial)]
    for program in programs.values():
        assert max(others) <= largest(program) < min(kernels.values())


def test_a_masked_step_has_such_arrays():
    config = runs.masked(LARGE["lenet"])
    run = setup.prepare(config)
    take = step.make_train_step(run)
    program = take.lower(start(config, run), batch_of(config, run, 0)).compile()
    assert largest(program) == 256 * 208


def test_scores_are_computed_by_rewirings_alone():
    config = LARGE["lenet"]
    run = setup.prepare(config)
    given = start(config, run), batch_of(config, run, 0)
    takes = runs.programs(run)
    texts = {rewires: str(jax.make_jaxpr(take)(*given)) for rewires, take in takes.items()}
    assert "f32[16,13]" not in texts[False] and "f32[16,13]" in texts[True]  # a grid of blocks


def test_the_state_is_donated(compiled):
    config, run, programs = compiled
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(start(config, run)))
    for program in programs.values():
        assert program.memory_analysis().alias_size_in_bytes == size


@pytest.mark.parametrize(
    "kind", [k if k == "lenet" else pytest.param(k, marks=slow) for k in LARGE]
)
def test_each_compiles_once_and_moves_nothing_between_host_and_device(kind, monkeypatch):
    runs.shorten(monkeypatch)
    config = config_lib.changed(runs.KINDS[kind], {"method.every": 3})
    run = setup.prepare(config)
    takes, now = runs.programs(run), start(config, run)
    batches = [batch_of(config, run, at) for at in range(5)]
    for at in (0, 1):  # a rewiring; an ordinary step
        before = jax.tree.leaves(now)
        now = takes[at == 0](now, batches[at])
        assert all(leaf.is_deleted() for leaf in before)
    with jax.transfer_guard("disallow"):
        for at in (2, 3, 4):
            now = takes[at == 3](now, batches[at])
        jax.block_until_ready(now)
    assert [takes[rewires]._cache_size() for rewires in (False, True)] == [1, 1]
    assert int(now.opt_state.rewirings) == 2 and int(now.opt_state.count) == 5
    assert np.isfinite(float(now.sums.loss))


def test_the_loop_asks_nothing_of_the_device_between_records(tmp_path, monkeypatch):
    """How far the optimizer is behind is asked at the start, and where steps may be skipped."""
    asked, delay = [], representation.Condensed.delay
    monkeypatch.setattr(
        representation.Condensed,
        "delay",
        lambda self, now: asked.append(int(now.step)) or delay(self, now),
    )
    config = config_lib.changed(LENET, {"steps": 12, "log.every": 12, "eval.every": 12})
    runs.train(config, tmp_path / "stop")
    assert asked == [0]
    runs.train(
        config_lib.changed(config, {"faults.on_nonfinite": "skip", "steps": 3}), tmp_path / "skip"
    )
    assert asked == [0, 0, 1, 2, 3]


@pytest.mark.parametrize(
    "kind", [k if k == "lenet" else pytest.param(k, marks=slow) for k in LARGE]
)
def test_both_lower_for_accelerators(kind, monkeypatch):
    runs.shorten(monkeypatch)
    config = runs.KINDS[kind]
    run = setup.prepare(config)
    batch = run.placement.put(run.task.training_batch(config, 0))
    for take in runs.programs(run).values():
        exported = jax.export.export(take, platforms=["tpu", "cuda"])(start(config, run), batch)
        assert exported.platforms == ("tpu", "cuda")


def test_a_computation_in_bfloat16_keeps_float32_weights_and_scores():
    config = config_lib.changed(LENET, {"model.dtype": "bfloat16"})
    run = setup.prepare(config)
    now = runs.advance(run, 2)
    kinds = {leaf.dtype.name for leaf in jax.tree.leaves((now.params, now.opt_state))}
    assert kinds == {"float32", "int32"}
    text = runs.programs(run)[True].lower(start(config, run), batch_of(config, run, 0))
    assert "xbf16>" in text.as_text()
    assert int(now.opt_state.rewirings) == 1 and np.isfinite(float(now.sums.loss))
