"""Which checkpoint the scripts look at, and where they compute."""

import io
import json

import jax
import pytest
from rich.console import Console

from rigl_optax.reports import page, page_figures
from rigl_optax.training import (
    command_line,
    costs,
    evaluation,
    loop,
    metrics,
    setup,
)
from rigl_optax.training import config as config_lib


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
    assert int(evaluation.restore(workdir, config, run, which).step) == step


def test_the_page_shows_the_checkpoint_asked_for(trained):
    assert "the checkpoint of step 20" in page.render(trained[-1], "best")


@pytest.mark.parametrize("which", ["12", "worst", "-1"])
def test_a_checkpoint_that_is_not_there_is_refused(trained, which):
    config, run, workdir = trained
    message = rf"--step={which}: must be newest, best .* which are \[10, 20, 30\]"
    with pytest.raises(ValueError, match=message):
        evaluation.restore(workdir, config, run, which)
    with pytest.raises(ValueError, match=message):
        page_figures.masks(workdir, config, which)


def test_without_checkpoints_it_is_said(trained, tmp_path):
    config, run, _ = trained
    with pytest.raises(ValueError, match="has no checkpoint yet"):
        evaluation.restore(tmp_path, config, run)


def test_looking_at_a_run_takes_no_accelerator_unless_told_to(monkeypatch):
    set_to = []
    monkeypatch.setattr(jax.config, "update", lambda name, value: set_to.append((name, value)))
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    command_line.use_cpu()
    assert not set_to
    monkeypatch.delenv("JAX_PLATFORMS")
    command_line.use_cpu()
    assert set_to == [("jax_platforms", "cpu")]


def test_the_page_of_a_run_that_prunes_tells_of_its_end(small):
    config = config_lib.changed(
        small,
        {"method.name": "gmp", "method.distribution": {"name": "uniform"}, "method.sparsity": 0.5},
    )
    report = costs.explain(config, setup.prepare(config))
    explained = report.to_dict()
    facts = page._facts([], explained, {})
    assert (
        f"{report.active_at_end:,}</b>of {report.weights:,} weights active when training" in facts
    )
    table = page._layers(explained, [])
    assert "active at the end" in table and "0.5000" in table
