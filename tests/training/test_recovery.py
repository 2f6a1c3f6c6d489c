"""Losses that are not finite, and what the config says to do about them."""

import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from rigl_optax.data import batches
from rigl_optax.training import checkpoints, evaluation, files, loop, metrics, recovery, setup
from rigl_optax.training import config as config_lib
from tests.training.test_checkpoints import damage, given_up

pytestmark = pytest.mark.usefixtures("shared_programs")

BAD = 33  # between two checkpoints, and not a rewiring step


@pytest.fixture
def spoiled(monkeypatch):
    """One batch has labels that do not exist: its loss is NaN. Gives back the sound function."""
    sound = batches.training_batch

    def training_batch(*args, step, **keys):
        batch = sound(*args, step=step, **keys)
        if step == BAD:
            batch["labels"] = np.full_like(batch["labels"], 1000)
        return batch

    monkeypatch.setattr(batches, "training_batch", training_batch)
    return sound


def train(config, workdir):
    out = io.StringIO()
    result = loop.train(config, workdir, Console(file=out, width=300))
    return result, out.getvalue()


def final(config, workdir):
    with checkpoints.read_checkpoints(workdir) as saved:
        return checkpoints.restore_newest(saved, setup.prepare(config).abstract, print)


def test_stop(small, tmp_path, spoiled):
    with pytest.raises(recovery.NonFiniteError, match="not finite, noticed after step 40"):
        train(small, tmp_path)
    with checkpoints.read_checkpoints(tmp_path) as saved:
        assert [c.step for c in saved.checkpoints] == [20]
    assert not (tmp_path / checkpoints.RESULT_FILE).exists()


@pytest.mark.exact
def test_skip_and_rollback_end_alike_without_that_step(small, tmp_path, spoiled):
    ends = []
    for policy in ("skip", "rollback"):
        config = config_lib.changed(small, {"faults.on_nonfinite": policy})
        result, printed = train(config, tmp_path / policy)
        assert any("1 steps up to step 40 were skipped" in w for w in result["warnings"])
        ends.append(final(config, tmp_path / policy))
        records = metrics.read(tmp_path / policy / metrics.FILE)
        assert [r["step"] for r in records if r.get("skipped") == 1] == [40]
        assert ("back to the last checkpoint" in printed) == (policy == "rollback")
        notes = [(r["step"], r["from"]) for r in records if r["kind"] == "rollback"]
        assert notes == ([(20, 40.0)] if policy == "rollback" else [])
    for a, b in zip(*map(jax.tree.leaves, ends), strict=True):
        np.testing.assert_array_equal(a, b)
    # All but that step was done: one less than calls.
    assert int(ends[0].opt_state.count) == small.steps - 1
    assert int(ends[0].step) == small.steps


@given_up
def test_going_back_passes_over_what_is_damaged_or_from_after_the_bad_step(
    small, tmp_path, spoiled, monkeypatch, settled
):
    config = config_lib.changed(small, {"faults.on_nonfinite": "rollback", "checkpoint.keep": 5})
    with monkeypatch.context() as patch:
        patch.setattr(batches, "training_batch", spoiled)
        train(config, tmp_path)
    with checkpoints.read_checkpoints(tmp_path) as saved:
        assert [c.step for c in saved.checkpoints] == [20, 40, 60]
    for step in ("40", "60"):
        damage(tmp_path / "checkpoints" / step)
    result, printed = train(config, tmp_path)
    assert "checkpoint 40 cannot be read" in printed and "resumed at step 20" in printed
    records = metrics.read(tmp_path / metrics.FILE)
    assert [(r["step"], r["from"]) for r in records if r["kind"] == "rollback"] == [(20, 40.0)]
    assert any("1 steps up to step 40 were skipped" in w for w in result["warnings"])
    assert int(final(config, tmp_path).opt_state.count) == small.steps - 1


def test_going_back_in_vain_ends_the_run(small, tmp_path):
    config = config_lib.changed(
        small, {"faults.on_nonfinite": "rollback", "optimizer.learning_rate": 1e38}
    )
    with pytest.raises(recovery.NonFiniteError, match="the validation loss is nan after step 20"):
        train(config, tmp_path)


def with_bad_batches(monkeypatch, is_bad):
    sound = batches.training_batch

    def training_batch(*args, step, **keys):
        batch = sound(*args, step=step, **keys)
        if is_bad(step):
            batch["labels"] = np.full_like(batch["labels"], 1000)
        return batch

    monkeypatch.setattr(batches, "training_batch", training_batch)


def test_a_run_goes_back_again_and_ends_as_if_killed_in_between(small, tmp_path, monkeypatch):
    with_bad_batches(monkeypatch, lambda step: step in (13, 33, 53))
    config = config_lib.changed(small, {"faults.on_nonfinite": "rollback", "checkpoint.keep": 5})
    with pytest.raises(
        recovery.NonFiniteError, match="step 60, after going back 2 times, the last time from st"
    ):
        train(config_lib.changed(config, {"faults.max_rollbacks": 2}), tmp_path / "killed")
    _, printed = train(config, tmp_path / "killed")
    assert "resumed at step 40" in printed
    train(config, tmp_path / "whole")
    for name in ("killed", "whole"):
        records = metrics.read(tmp_path / name / metrics.FILE)
        notes = [(r["step"], r["from"], r["times"]) for r in records if r["kind"] == "rollback"]
        assert notes == [(0, 20.0, 1), (20, 40.0, 2), (40, 60.0, 3)]
    ends = [final(config, tmp_path / name) for name in ("killed", "whole")]
    for a, b in zip(*map(jax.tree.leaves, ends), strict=True):
        np.testing.assert_array_equal(a, b)
    assert int(ends[0].opt_state.count) == small.steps - 3


def test_steps_skipped_are_counted_over_the_whole_run(small, tmp_path, monkeypatch):
    with_bad_batches(monkeypatch, lambda step: step in (3, 13) or 30 <= step < 40)
    result, printed = train(config_lib.changed(small, {"faults.on_nonfinite": "skip"}), tmp_path)
    assert any("12 steps up to step 40 were skipped" in w for w in result["warnings"])
    records = [r for r in metrics.read(tmp_path / metrics.FILE) if r["kind"] == "train"]
    assert [r.get("skipped", 0) for r in records] == [1, 1, 0, 10, 0, 0]
    assert [r["step"] for r in records if "loss" not in r] == [40]  # of no step there is none


def test_nothing_but_skipped_steps_ends_a_run(small, tmp_path, monkeypatch):
    with_bad_batches(monkeypatch, lambda step: step >= 5)
    config = config_lib.changed(small, {"faults.on_nonfinite": "skip"})
    with pytest.raises(recovery.NonFiniteError, match="last 50 steps up to step 60 were all skip"):
        train(config, tmp_path)
    all_of = {10: 5.0, 20: 10.0, 25: 5.0}  # the last record is not on a multiple
    recovery.check_skipped(all_of, 25, 10)
    with pytest.raises(recovery.NonFiniteError, match="last 55 steps"):
        recovery.check_skipped(all_of | {10: 10.0, 20: 40.0}, 25, 10)


@pytest.mark.parametrize(("split", "at"), [("validation", 20), ("test", 60)])
def test_an_evaluation_that_is_not_finite_ends_a_run(small, tmp_path, monkeypatch, split, at):
    make = evaluation.evaluator

    def evaluator(run):
        evaluate = make(run)
        bad = getattr(run.dataset, split)
        return lambda state, part: evaluate(state, part) | ({"loss": np.nan} if part is bad else {})

    monkeypatch.setattr(evaluation, "evaluator", evaluator)
    config = config_lib.changed(small, {"faults.on_nonfinite": "rollback", "checkpoint.every": 0})
    with pytest.raises(recovery.NonFiniteError, match=f"the {split} loss is nan after step {at}"):
        train(config, tmp_path)
    assert not (tmp_path / checkpoints.RESULT_FILE).exists()
    for line in (tmp_path / metrics.FILE).read_text().splitlines():
        files.parse(line, files.RECORD)


@pytest.mark.exact
def test_a_healthy_run_is_the_same_under_every_policy(small, tmp_path):
    ends = []
    for policy in recovery.POLICIES:
        config = config_lib.changed(small, {"faults.on_nonfinite": policy})
        train(config, tmp_path / policy)
        ends.append(final(config, tmp_path / policy))
    for end in ends[1:]:
        for a, b in zip(*map(jax.tree.leaves, (ends[0], end)), strict=True):
            np.testing.assert_array_equal(a, b)


def test_an_unknown_policy_is_refused(small):
    with pytest.raises(ValueError, match="on_nonfinite='ignore'.*stop, skip, rollback"):
        config_lib.changed(small, {"faults.on_nonfinite": "ignore"})


def test_a_loss_that_leaps_is_told_of():
    calm = [1.0, 1.1, 0.9, 1.0, 1.0, 1.2, 1.0, 0.8, 1.0, 1.0]
    assert recovery.spike([*calm, 2.9]) is None
    assert recovery.spike([*calm[:5], 9.0]) is None  # too early to say
    assert "leapt to 3.1, from 1 " in recovery.spike([*calm, 3.1])
    assert "leapt" in recovery.spike([50.0, *calm, 3.1])


def test_the_best_checkpoint_is_kept_besides_the_newest(tmp_path, small):
    like = setup.prepare(small).initial
    measured = {1: 0.2, 2: 0.9, 4: 0.4, 5: 0.6}
    accuracies = {}
    with checkpoints.open_checkpoints(tmp_path, 2, accuracies) as saved:
        for step in range(1, 7):
            accuracies |= {at: value for at, value in measured.items() if at == step}
            checkpoints.save(saved, like._replace(step=jnp.int32(step)))
        saved.wait()
        assert [c.step for c in saved.checkpoints] == [3, 5, 6]  # that of 3 is 2's 0.9


def test_a_checkpoint_goes_onto_another_number_of_devices(small, tmp_path):
    whole, _ = train(config_lib.changed(small, {"checkpoint.every": 0}), tmp_path / "whole")
    train(small, tmp_path / "parts")
    with checkpoints.open_checkpoints(tmp_path / "parts", 5) as saved:
        for checkpoint in saved.checkpoints[1:]:
            saved.delete(checkpoint.step)
    eight = config_lib.changed(small, {"mesh.data": 1, "mesh.params": 5})
    result, printed = train(eight, tmp_path / "parts")
    assert "resumed at step" in printed
    assert result["active_weights"] == whole["active_weights"]
    assert result["fingerprints"].keys() == whole["fingerprints"].keys()
    assert json.loads((tmp_path / "parts" / "config.json").read_text())["mesh"]["params"] == 5


def test_a_leap_in_training_is_recorded_and_warned_of(small, tmp_path, monkeypatch):
    sound = batches.training_batch

    def training_batch(*args, step, **keys):
        batch = sound(*args, step=step, **keys)
        if step == 36:
            batch["images"] = np.full_like(batch["images"], 255)
        return batch

    monkeypatch.setattr(batches, "training_batch", training_batch)
    monkeypatch.setattr(recovery, "SPIKE", 1.3)  # so early there is little to lose: 2.3, then 3.3
    config = config_lib.changed(small, {"log.every": 2, "steps": 40})
    result, printed = train(config, tmp_path)
    assert "warning: step 38: the training loss leapt to" in printed
    assert any("leapt" in warning for warning in result["warnings"])
    leaps = [r for r in metrics.read(tmp_path / metrics.FILE) if r["kind"] == "spike"]
    assert [r["step"] for r in leaps] == [38]
