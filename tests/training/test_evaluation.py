"""Which checkpoint is evaluated, and what an evaluation measures."""

import io
import json

import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from rich.console import Console

from rigl_optax.reports import page, page_figures
from rigl_optax.training import config as config_lib
from rigl_optax.training import evaluation, loading, loop, metrics, setup


@pytest.fixture(scope="module")
def trained(tmp_path_factory, small):
    """Config, run and workdir of a run that was best at its second checkpoint of three."""
    config = config_lib.changed(small, {"steps": 30, "checkpoint.every": 10, "eval.every": 10})
    config = config_lib.changed(config, {"checkpoint.keep": 3})
    workdir = tmp_path_factory.mktemp("trained")
    loop.train(config, workdir, Console(file=io.StringIO()))
    path, accuracy = workdir / metrics.FILE, {10: 0.5, 20: 0.9, 30: 0.7}
    records = metrics.read(path)
    for record in records:
        if record["kind"] == "validation":
            record["accuracy"] = accuracy[record["step"]]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return config, setup.prepare(config), workdir


@pytest.mark.parametrize(("which", "step"), [("newest", 30), ("best", 20), ("10", 10)])
def test_a_checkpoint_by_its_name(trained, which, step):
    config, run, workdir = trained
    assert int(loading.restore(run, workdir, which).step) == step


def test_the_page_shows_the_checkpoint_asked_for(trained):
    assert "the checkpoint of step 20" in page.render(trained[-1], "best")


@pytest.mark.parametrize("which", ["12", "worst", "-1"])
def test_a_checkpoint_that_is_not_there_is_refused(trained, which):
    config, run, workdir = trained
    message = rf"step={which}: must be newest, best .* which are \[10, 20, 30\]"
    with pytest.raises(ValueError, match=message):
        loading.restore(run, workdir, which)
    with pytest.raises(ValueError, match=message):
        page_figures.masks(workdir, config, which)


def test_without_checkpoints_it_is_said(trained, tmp_path):
    config, run, _ = trained
    with pytest.raises(ValueError, match="has no checkpoint yet"):
        loading.restore(run, tmp_path)


def test_evaluation_uses_running_statistics_and_counts_every_example(trained_vision):
    vision, _, result, run, state = trained_vision
    evaluate = evaluation.evaluator(run)
    found = evaluate(state, run.dataset.test)
    assert found["accuracy"] == result["test"]["accuracy"]
    model = nnx.merge(run.graphdef, state.params, state.model_state)
    model.eval()
    images, labels = run.dataset.test.images, run.dataset.test.labels
    logits = nnx.jit(lambda m, x: m(x))(model, jnp.asarray(images[:100], jnp.float32) / 16)
    some = evaluate(state, type(run.dataset.test)(images[:100], labels[:100]))
    assert some["accuracy"] == pytest.approx(float((logits.argmax(-1) == labels[:100]).mean()))
    plain = optax.softmax_cross_entropy_with_integer_labels(logits, labels[:100])
    assert some["loss"] == pytest.approx(float(plain.mean()), rel=1e-4)
