"""Language models over bytes, through the same loop as everything else."""

import io
import itertools
import json
import math
import subprocess
import sys

import jax
import numpy as np
import pytest
from rich.console import Console

import rigl_optax
from rigl_optax.data import text
from rigl_optax.models import recurrent
from rigl_optax.training import (
    checkpoints,
    evaluation,
    loop,
    methods,
    sampling,
    setup,
    step,
    tasks,
)
from rigl_optax.training import config as config_lib

pytestmark = pytest.mark.usefixtures("shared_programs")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    from tests.training.conftest import SMALL

    folder = tmp_path_factory.mktemp("text")
    (folder / "a.txt").write_bytes(b"the quick brown fox jumps over the lazy dog. " * 60)
    (folder / "b.txt").write_bytes(b"pack my box with five dozen liquor jugs. " * 60)
    return config_lib.changed(
        SMALL,
        {
            "data.name": "text",
            "data.dir": str(folder),
            "model.name": "gru",
            "model.hidden": (24,),
            "model.embedding": 16,
            "model.readout": (16,),
            "data.sequence_length": 20,
            "batch_size": 8,
            "eval.batch_size": 4,
            "optimizer.name": "adam",
            "optimizer.learning_rate": 1e-2,
            "optimizer.schedule": "constant",
            "optimizer.gradient_clip": 10.0,
            "method.distribution": {"name": "uniform"},
            "method.sparsity": 0.5,
            "steps": 60,
            "method.every": 7,
        },
    )


LSTM = {
    "name": "lstm",
    "hidden": (24,),
    "embedding": 16,
    "readout": (16,),
    "fused": False,
}


def train(config, workdir):
    return loop.train(config, workdir, Console(file=io.StringIO(), width=120))


def final(config, workdir):
    with checkpoints.read_checkpoints(workdir) as saved:
        return checkpoints.restore_newest(saved, setup.prepare(config).abstract, print)


@pytest.fixture(scope="module")
def trained(config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("trained")
    return workdir, train(config, workdir)


def test_it_learns_and_is_sparse(config, trained):
    workdir, result = trained
    bits = result["test"]["bits_per_byte"]
    assert bits == pytest.approx(result["test"]["loss"] / math.log(2))
    assert bits < 3.5, "8 bits say nothing; letters alone are some 4"
    params = final(config, workdir).params
    for path in ("input", "recurrent"):
        kernel = np.asarray(params["layers"][0][path]["kernel"])
        assert (kernel == 0).mean() == 0.5
    assert (np.asarray(params["embedding"]["embedding"]) != 0).all()
    halved = (16 + 24) * 3 * 24 + 24 * 16  # weights; each costs 2 FLOPs for each of 20 bytes
    saved = result["flops"]["inference_dense"] - result["flops"]["inference"]
    assert saved == 2 * 20 * halved / 2
    assert result["warnings"] == []


def test_what_is_carried_comes_from_the_batch_before(config, trained):
    state = final(config, trained[0])
    (carried,) = jax.tree.leaves(state.model_state)
    assert carried.shape == (8, 24) and (np.asarray(carried) != 0).any()


def test_evaluation_is_that_of_a_model_that_reads_each_lane_whole(config, trained):
    run, state = setup.prepare(config), final(config, trained[0])
    found = evaluation.evaluator(run)(state, run.dataset.test)
    part = run.dataset.test
    predicted = len(part.tokens) - 1
    edges = np.arange(5) * predicted // 4
    total = 0.0
    for low, high in itertools.pairwise(edges):
        rest = run.task.at_rest(state.model_state, 1)
        tokens = np.asarray(part.tokens[low:high])[None]
        logits, _ = sampling._read(run.graphdef, state.params, rest, tokens)
        logits = np.asarray(logits[0], np.float64)
        logits -= logits.max(-1, keepdims=True)
        logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        total -= logp[np.arange(high - low), part.tokens[low + 1 : high + 1]].sum()
    assert found["loss"] == pytest.approx(total / predicted, rel=1e-5)


def test_numbers_that_are_no_bytes_are_refused(config, trained):
    run, state = setup.prepare(config), final(config, trained[0])
    with pytest.raises(ValueError, match=r"prompt=\[97, 300\]: tokens are 0 to 255"):
        sampling.sample_tokens(run, state, 2, prompt=[97, 300], temperature=0.0, seed=0)


def test_stopped_and_started_again_it_ends_bit_for_bit_the_same(config, trained, tmp_path):
    train(config, tmp_path)
    with checkpoints.open_checkpoints(tmp_path, 5) as saved:
        for checkpoint in saved.checkpoints:
            if checkpoint.step == config.steps:
                saved.delete(checkpoint.step)
    (tmp_path / checkpoints.RESULT_FILE).unlink()
    again = train(config, tmp_path)
    pair = (jax.tree.leaves(final(config, workdir)) for workdir in (tmp_path, trained[0]))
    for found, expected in zip(*pair, strict=True):
        np.testing.assert_array_equal(found, expected)
    assert again["test"] == trained[1]["test"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dense", "small_dense", "snip", "snfs", "str"])
def test_other_methods_train_it_too(config, name, tmp_path):
    short = config_lib.changed(config, {"method.name": name, "steps": 12, "checkpoint.every": 0})
    result = train(short, tmp_path)
    assert np.isfinite(result["test"]["loss"])
    assert name in methods.METHODS


def test_an_lstm_with_separate_gates_has_a_mask_for_each(config, tmp_path):
    lstm = config_lib.changed(config, {"model": LSTM, "steps": 8})
    train(lstm, tmp_path)
    masks = rigl_optax.get_masks(final(lstm, tmp_path).opt_state)
    for gate in ("input", "forget", "cell", "output"):
        assert np.asarray(masks["layers"][0]["recurrent"][gate]["kernel"]).mean() == 0.5


def test_gates_may_have_sparsities_of_their_own(config):
    overrides = (("recurrent/reset", 0.25), ("input/candidate", 0.75))
    own = config_lib.changed(
        config,
        {
            "model": LSTM | {"name": "gru"},
            "method.distribution": {"name": "uniform", "overrides": overrides},
        },
    )
    masks = rigl_optax.get_masks(setup.prepare(own).initial.opt_state)["layers"][0]
    density = {
        (kind, gate): float(np.asarray(masks[kind][gate]["kernel"]).mean())
        for kind in ("input", "recurrent")
        for gate in recurrent.GATES["gru"]
    }
    assert density.pop(("recurrent", "reset")) == 0.75
    assert density.pop(("input", "candidate")) == 0.25
    assert set(density.values()) == {0.5}


@pytest.mark.parametrize("model", ["gru", "lstm"])
def test_a_step_is_compiled_once_and_moves_nothing_between_host_and_device(config, model):
    run = setup.prepare(config_lib.changed(config, {"model.name": model}))
    take = step.make_train_step(run)
    state = jax.tree.map(lambda x: x.copy(), run.initial)._replace(history=None)
    everywhere = jax.sharding.NamedSharding(run.placement.mesh, jax.sharding.PartitionSpec())
    batches = [jax.device_put(run.task.training_batch(config, n), everywhere) for n in range(9)]
    state = take(state, batches[0])
    with jax.transfer_guard("disallow"):
        for batch in batches[1:]:  # a rewiring among them
            state = take(state, batch)
    assert take._cache_size() == 1
    assert int(state.opt_state.rewirings) == 2


@pytest.mark.parametrize("model", ["gru", "lstm"])
def test_a_step_lowers_for_accelerators(config, model):
    run = setup.prepare(config_lib.changed(config, {"model.name": model}))
    take = step.make_train_step(run)
    batch = run.placement.put(run.task.training_batch(config, 0))
    exported = jax.export.export(take, platforms=["tpu", "cuda"])(
        run.initial._replace(history=None), batch
    )
    assert exported.platforms == ("tpu", "cuda")
    assert "stablehlo.while" in exported.mlir_module()


@pytest.mark.slow
def test_the_scripts_print_bits_per_byte_and_text(config, trained):
    def told(script, *flags):
        command = [sys.executable, f"scripts/{script}.py", f"--workdir={trained[0]}", *flags]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    assert f"bits per byte {trained[1]['test']['bits_per_byte']:.3f}" in told("evaluate")
    drawn = told("sample", "--length=30", "--prompt=the ", "--temperature=0")
    run, state = setup.prepare(config), final(config, trained[0])
    expected = sampling.sample(run, state, 30, prompt=b"the ", temperature=0, seed=0)
    assert drawn == f"the {expected.decode(errors='replace')}\n"


def test_what_it_goes_on_with_is_a_function_of_the_seed(config, trained):
    run, state = setup.prepare(config), final(config, trained[0])

    def drawn(temperature=1.0, seed=0):
        return sampling.sample(run, state, 40, prompt=b"the ", temperature=temperature, seed=seed)

    assert len(drawn()) == 40 and drawn() == drawn() != drawn(seed=1)
    likeliest = drawn(temperature=0)
    assert likeliest == drawn(temperature=0, seed=1) and likeliest.isascii()
    with pytest.raises(ValueError, match="length=0"):
        sampling.sample(run, state, 0, prompt=b"a", temperature=1.0, seed=0)


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"model.name": "lenet"}, "models for text are gru, lstm"),
        (
            {"data.name": "digits", "data.dir": "", "data.sequence_length": 0},
            "models for digits are lenet, ",
        ),
        ({"data.sequence_length": 0}, "sequence of 0"),
        ({"data.sequence_length": 10_000}, "too few for a sequence of 10000"),
        ({"model.lanes": 3}, "lanes"),
        ({"model.heads": 3}, "config.model.heads: .*for 'gru' embedding, "),
        ({"model.dtype": "bfloat16"}, "recurrent models are for 'float32' alone"),
        ({"data.augment": "pad_crop"}, "texts are for 'none' alone"),
        ({"optimizer.name": "scale"}, "must be an optimizer of optax or optax.contrib"),
        (
            {"method.distribution": {"name": "uniform", "power": 2.0}},
            "distribution.power: .*for 'uniform' .*overrides, stacked",
        ),
        (
            {"method.distribution": {"name": "erk", "overrides": 3}},
            "distribution.overrides=3: must be pairs",
        ),
        ({"method.name": "synflow"}, "synflow': not for text"),
        ({"mesh.axes": "explicit"}, "recurrent models are for 'auto' alone"),
    ],
)
def test_what_makes_no_sense_is_refused(config, keys, told):
    with pytest.raises(ValueError, match=told):
        setup.prepare(config_lib.changed(config, keys))


def test_a_split_over_devices_is_the_same_text(config):
    found = tasks.find(config).training_batch(config, 3)
    halves = [tasks.find(config).training_batch(config, 3, r) for r in np.split(np.arange(8), 2)]
    for name, whole in found.items():
        np.testing.assert_array_equal(np.concatenate([h[name] for h in halves]), whole)
    assert text.steps_per_epoch(len(tasks.find(config).dataset.train.tokens), 8, 20) > 3


@pytest.mark.slow
def test_eight_devices_have_the_same_masks(config, trained, tmp_path):
    across = config_lib.changed(config, {"mesh.data": 4, "mesh.params": 2})
    result = train(across, tmp_path)
    assert result["fingerprints"] == trained[1]["fingerprints"]
    assert json.loads((tmp_path / "result.json").read_text())["test"]["loss"] == pytest.approx(
        trained[1]["test"]["loss"], rel=1e-3
    )
