import dataclasses
import errno
import io
import itertools
import json
import os
import re
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

import rigl_optax
from rigl_optax import _paths
from rigl_optax.data import batches
from rigl_optax.training import (
    checkpoints,
    checks,
    loop,
    metrics,
    recovery,
    setup,
    signals,
    sparsity,
)
from rigl_optax.training import config as config_lib
from rigl_optax.training.rewirings import Rewirings

pytestmark = pytest.mark.usefixtures("shared_programs")


def train(config, workdir):
    out = io.StringIO()
    result = loop.train(config, workdir, Console(file=out, width=120, highlight=False))
    return result, out.getvalue()


def final_state(config, workdir):
    with checkpoints.open_checkpoints(workdir, 2) as saved:
        return checkpoints.restore_newest(saved, setup.prepare(config).abstract, print)


def assert_same_state(found, expected):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, small):
    """An uninterrupted run: config, workdir, result, what it printed."""
    workdir = tmp_path_factory.mktemp("finished")
    return small, workdir, *train(small, workdir)


def test_the_result_says_what_was_trained_and_what_it_cost(finished):
    _, workdir, result, _ = finished
    assert json.loads((workdir / checkpoints.RESULT_FILE).read_text()) == result
    assert result["test"]["loss"] < 2.25  # ln 10 = 2.30 is chance
    assert result["warnings"] == []
    assert sum(result["active_weights"].values()) == 358 and result["weights"] == 1620
    flops = result["flops"]
    kernels = sum(n for path, n in result["active_weights"].items() if path.endswith("kernel"))
    assert flops["inference"] == pytest.approx(2 * kernels)
    assert flops["inference_dense"] == 2 * (64 * 20 + 20 * 10 + 10 * 10)
    assert flops["training_dense"] == 3 * 60 * 50 * flops["inference_dense"]
    rewirings = 5
    saved = flops["inference_dense"] - flops["inference"]
    assert flops["training"] == pytest.approx(
        3 * 60 * 50 * flops["inference"] + rewirings * 50 * saved
    )


def test_it_prints_what_will_be_sparse_before_it_trains(finished):
    printed = finished[-1]
    table, rest = printed.split("step 10/60")
    for text in ("layers/0/kernel", "64x20", "layers/0/bias", "fewer than two dimensions"):
        assert text in table
    assert "test accuracy" in rest


def test_metrics_hold_losses_and_the_state_of_the_masks(finished):
    _, workdir, result, _ = finished
    records = metrics.read(workdir / metrics.FILE)
    train_steps = [r["step"] for r in records if r["kind"] == "train"]
    assert train_steps == [10, 20, 30, 40, 50, 60]
    assert [r["step"] for r in records if r["kind"] == "validation"] == [20, 40, 60]
    assert [r["kind"] for r in records].count("test") == 1
    rewirings = [r["rewirings"] for r in records if r["kind"] == "train"]
    assert rewirings == [1, 2, 3, 4, 5, 5]
    fractions = [r["drop_fraction"] for r in records if r["kind"] == "train"]
    assert all(a > b for a, b in itertools.pairwise(fractions[:5])) and fractions[-1] == 0
    densities = {r["density"] for r in records if r["kind"] == "train"}
    assert densities == {sum(result["active_weights"].values()) / result["weights"]}


def test_every_record_says_what_training_has_cost_so_far(finished):
    _, workdir, result, _ = finished
    records = metrics.read(workdir / metrics.FILE)
    spent = {r["step"]: r["training_flops"] for r in records}
    assert spent[60] == result["flops"]["training"]
    dense, sparse = result["flops"]["inference_dense"], result["flops"]["inference"]
    assert spent[1] == pytest.approx(50 * (dense + 2 * sparse))  # a rewiring: 50 examples
    assert spent[10] - spent[1] == pytest.approx(9 * 50 * 3 * sparse)
    assert {r["kind"] for r in records} == {"train", "validation", "rewiring", "test"}


def test_every_inactive_weight_is_zero_at_the_end(finished):
    config, workdir, *_ = finished
    state = final_state(config, workdir)
    assert_same_state(rigl_optax.apply_masks(state.params, state.opt_state), state.params)


class Stopped(Exception):
    pass


@pytest.mark.parametrize("stop_at", [5, 20, 21, 33, 41, 60])
def test_a_run_stopped_anywhere_and_started_again_ends_bit_for_bit_the_same(
    finished, tmp_path, monkeypatch, stop_at
):
    # Rewirings are at 0, 10, ..., 40 and checkpoints at 20, 40, 60.
    config, uninterrupted, result, _ = finished
    real = batches.training_batch

    def stopping(*args, step, **keys):
        if step == stop_at - 1:
            raise Stopped
        return real(*args, step=step, **keys)

    with monkeypatch.context() as patch:
        patch.setattr(batches, "training_batch", stopping)
        with pytest.raises(Stopped):
            train(config, tmp_path)
    again, printed = train(config, tmp_path)
    assert ("resumed at step" in printed) == (stop_at > 20)
    assert_same_state(final_state(config, tmp_path), final_state(config, uninterrupted))
    assert again["test"] == result["test"]
    assert metrics.read(tmp_path / metrics.FILE) == metrics.read(uninterrupted / metrics.FILE)


def test_ctrl_c_finishes_the_step_saves_and_says_so(finished, tmp_path, monkeypatch):
    config, _, result, _ = finished
    real = batches.training_batch

    def interrupting(*args, step, **keys):
        if step == 32:
            signal.raise_signal(signal.SIGINT)
        return real(*args, step=step, **keys)

    with monkeypatch.context() as patch, pytest.raises(signals.StoppedError) as told:
        patch.setattr(batches, "training_batch", interrupting)
        train(config, tmp_path)
    saved = re.fullmatch(r"asked to stop: saved at step (\d+) of 60", str(told.value))[1]
    assert told.value.status == 130
    again, printed = train(config, tmp_path)
    assert f"resumed at step {saved} of 60" in printed
    assert again["fingerprints"] == result["fingerprints"] and again["test"] == result["test"]


def test_one_state_is_on_the_device_in_training_and_after_a_resume(small, tmp_path, monkeypatch):
    config = config_lib.changed(
        small,
        {
            "model.hidden": (600, 304),
            "steps": 25,
            "method.sparsity": 0.5,
            "checkpoint.every": 20,
            "eval.every": 25,
        },
    )
    others = jax.live_arrays()  # of other tests; kept, so that no new one has the place of one
    known = set(map(id, others))
    found = []

    def check(state):
        own = {id(x): x.nbytes for x in jax.live_arrays() if id(x) not in known}
        sizes = [x.nbytes for x in jax.tree.leaves(state)]
        masks = sum(x.nbytes for x in jax.tree.leaves(state.opt_state) if x.dtype != np.float32)
        found.append((int(state.step), sum(own.values()) - sum(sizes), masks, sum(sizes)))

    monkeypatch.setattr(recovery, "check", check)
    real = batches.training_batch

    def stopping(*args, step, **keys):
        if step == 22:
            raise Stopped
        return real(*args, step=step, **keys)

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(batches, "training_batch", stopping)
        train(config, tmp_path)
    assert "resumed at step 20 of 25" in train(config, tmp_path)[1]
    assert {step for step, *_ in found} == {10, 20, 25}
    for _, beside, masks, whole in found:
        # The first masks, for what is told of them; batches and sums.
        assert beside <= masks + 100_000 < whole / 3


def test_metrics_are_read_once_at_a_start(finished, tmp_path, monkeypatch):
    config, workdir, *_ = finished
    shutil.copytree(workdir, tmp_path / "run")
    read, calls = metrics.read, []
    monkeypatch.setattr(metrics, "read", lambda path: calls.append(path) or read(path))
    train(config, tmp_path / "run")
    # At the start, by the writer that drops what is recorded again, and for the curve at the end.
    assert len(calls) == 3


def test_a_finished_run_started_again_only_evaluates(finished):
    config, workdir, result, _ = finished
    before = final_state(config, workdir)
    records = metrics.read(workdir / metrics.FILE)
    again, printed = train(config, workdir)
    assert "resumed at step 60 of 60" in printed
    assert again["test"] == result["test"]
    assert again["steps_per_second"] == result["steps_per_second"] > 0
    assert_same_state(final_state(config, workdir), before)
    assert metrics.read(workdir / metrics.FILE) == records


def test_another_config_in_the_same_workdir_is_refused(finished):
    config, workdir, *_ = finished
    with pytest.raises(ValueError, match=r"sparsity: 0\.8 -> 0\.7"):
        train(config_lib.changed(config, {"method.sparsity": 0.7}), workdir)


@pytest.mark.parametrize("config_file", ["deleted", "replaced"])
def test_a_checkpoint_knows_its_config_itself(finished, tmp_path, config_file):
    config, workdir, *_ = finished
    shutil.copytree(workdir / "checkpoints", tmp_path / "checkpoints")
    other = config_lib.changed(config, {"method.sparsity": 0.7, "optimizer.momentum": 0.5})
    if config_file == "replaced":
        checkpoints.claim(tmp_path, other)
    before = sorted(path.name for path in tmp_path.iterdir())
    told = r"checkpoint 60 is of a run .*sparsity: 0\.8 -> 0\.7; .*momentum: 0\.9 -> 0\.5"
    with pytest.raises(ValueError, match=told):
        train(other, tmp_path)
    # It is as it was, so that the right config can go on.
    assert sorted({path.name for path in tmp_path.iterdir()} - {"lock"}) == before
    if config_file == "deleted":
        assert "resumed at step 60 of 60" in train(config, tmp_path)[1]


def test_dense_trains_all_weights(small, tmp_path):
    config = config_lib.changed(small, {"method.name": "dense", "steps": 20})
    result, printed = train(config, tmp_path)
    assert sum(result["active_weights"].values()) == result["weights"]
    assert result["flops"]["training"] == result["flops"]["training_dense"]
    assert "dense, lenet on digits: 20 steps" in printed and "layers/0/kernel" in printed


def test_methods_of_one_seed_start_from_the_same_weights_and_masks(small):
    static, rigl = (
        setup.prepare(config_lib.changed(small, {"method.name": name})).initial
        for name in ("static", "rigl")
    )
    assert_same_state(static.params, rigl.params)
    dense = setup.prepare(config_lib.changed(small, {"method.name": "dense"})).initial
    assert_same_state(rigl_optax.apply_masks(dense.params, rigl.opt_state), rigl.params)


def test_masks_are_not_tied_to_the_initial_weights(small):
    # One key for both selected only large positive weights in a prototype.
    run = setup.prepare(config_lib.changed(small, {"model.hidden": (300, 100)}))
    kernel = np.asarray(run.initial.params["layers"][0]["kernel"])
    active = kernel[kernel != 0]
    assert abs(active.mean()) < 0.05 * active.std() + 2 * active.std() / np.sqrt(active.size)


def tampered(run, **changes):
    """The initial state with something in the optimizer's state changed."""
    opt_state = run.initial.opt_state._replace(**{"count": jnp.int32(1), **changes})
    sums = run.initial.sums._replace(examples=jnp.float32(1))
    return run.initial._replace(opt_state=opt_state, sums=sums, step=jnp.int32(1))


def test_what_goes_silently_wrong_is_warned_of(small):
    run = setup.prepare(small)
    start = checks.start_of(run, run.initial)

    def warnings(state):
        return checks.training_record(run, state, start)[1]

    one, none = jnp.int32(1), jnp.int32(0)
    assert warnings(tampered(run, rewirings=one)) == {}
    assert warnings(tampered(run, rewirings=none)).keys() == {"rewirings"}
    # The second rewiring is at count 10: a step that was skipped has put it off.
    late = tampered(run, rewirings=one, count=jnp.int32(10))._replace(step=jnp.int32(11))
    assert warnings(late) == {}
    assert warnings(tampered(run, rewirings=one, healed=one)).keys() == {"healed"}
    masks = jax.tree.map(jnp.ones_like, run.initial.opt_state.masks)
    assert warnings(tampered(run, rewirings=one, masks=masks)).keys() == {"active"}

    def cut_off(share):
        number = lambda m: max(1, int(m.shape[-1] * share))
        cut = lambda m: m.at[..., : number(m)].set(False) if m.ndim > 1 else m
        return jax.tree.map(cut, masks)

    few = warnings(tampered(run, rewirings=one, masks=cut_off(0)))
    assert "layers/0" not in few.get("dead", "")  # one of many
    units = masks["layers"][1]["kernel"].shape[-1]
    lost, cut = int(units * 0.2), cut_off(0.2)
    found = warnings(tampered(run, rewirings=one, masks=cut))["dead"]
    assert f"layers/1/kernel 0 -> {lost} of {units}" in found and "learning rate" in found
    asked = config_lib.changed(
        small,
        {
            "method.structure": {
                "name": "unstructured",
                "layers": (("layers/1", {"name": "constant_fan_in", "min_salient": 0.3}),),
            }
        },
    )
    other = dataclasses.replace(run, config=asked)
    found = checks.training_record(other, tampered(run, rewirings=one, masks=cut), start)[1]
    assert f"layers/1/kernel 0 -> {lost}; if" in found["ablated"]
    assert "layers/0" in found["dead"] and "layers/1" not in found["dead"]
    assert checks.stray(run, run.initial) == {}
    whole = jax.tree.map(lambda x: x + 1, run.initial.params)
    assert "1262 inactive" in checks.stray(run, run.initial._replace(params=whole))["stray"]
    state = tampered(run, rewirings=one)
    unseeing = state._replace(sums=state.sums._replace(unseeing=one))
    assert warnings(unseeing).keys() == {"unseeing"}


def test_of_padded_blocks_their_number_is_watched(small):
    block = rigl_optax.Block(5, 7, pad=True)
    padded = config_lib.changed(
        small, {"method.structure": {"name": "block", "rows": 5, "cols": 7, "pad": True}}
    )
    run = setup.prepare(padded)
    start = checks.start_of(run, run.initial)
    masks = run.initial.opt_state.masks
    mask = masks["layers"][0]["kernel"]
    grid = np.asarray(block.groups(mask))

    def warnings(grid):
        new = jax.tree.map(lambda m: m, masks)
        new["layers"][0]["kernel"] = block.expand(jnp.asarray(grid), mask.shape)
        state = tampered(run, rewirings=jnp.int32(1), masks=new)
        assert checks.active_weights(run, state) != checks.active_weights(run, run.initial)
        return checks.training_record(run, state, start)[1]

    moved = grid.copy()
    moved[:, -1], moved[:, 0] = grid[:, 0], grid[:, -1]
    assert grid[:, 0].sum() != grid[:, -1].sum()
    assert "active" not in warnings(moved)
    assert "active groups" in warnings(np.ones_like(grid))["active"]


def test_a_warning_is_printed_once_and_kept_in_the_result(small, tmp_path, monkeypatch):
    monkeypatch.setattr(Rewirings, "before", lambda self, step: 77)
    result, printed = train(small, tmp_path)
    assert printed.count("warning:") == 1
    assert len(result["warnings"]) == 1 and "77 were scheduled" in result["warnings"][0]


@pytest.mark.parametrize("since", [10, 30])  # before the checkpoint at 20, and after it
def test_a_warning_is_told_once_however_often_a_run_is_started(small, tmp_path, monkeypatch, since):
    real, sound = Rewirings.before, batches.training_batch
    monkeypatch.setattr(
        Rewirings, "before", lambda self, step: 77 if step >= since else real(self, step)
    )

    def stopping(*args, step, **keys):
        if step == 32:
            raise Stopped
        return sound(*args, step=step, **keys)

    out = io.StringIO()
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(batches, "training_batch", stopping)
        loop.train(small, tmp_path, Console(file=out, width=120))
    assert out.getvalue().count("warning:") == 1
    result, printed = train(small, tmp_path)
    assert "resumed at step 20" in printed and "warning:" not in printed
    again, printed = train(small, tmp_path)
    assert "resumed at step 60" in printed and "warning:" not in printed
    for found in (result, again):
        assert len(found["warnings"]) == 1 and "77 were scheduled" in found["warnings"][0]
    records = [r for r in metrics.read(tmp_path / metrics.FILE) if r["kind"] == "warning"]
    assert [(r["step"], r["warning"]) for r in records] == [(since, "rewirings")]


def test_records_are_on_the_disk_before_a_checkpoint_that_follows_them(
    small, tmp_path, monkeypatch
):
    safe, behind = [0], []
    fsync, save = metrics.os.fsync, checkpoints.save
    path = tmp_path / metrics.FILE

    def watched_fsync(number):
        fsync(number)
        if path.exists() and metrics.os.fstat(number).st_ino == path.stat().st_ino:
            safe[0] = path.stat().st_size

    def watched_save(*args, **keys):
        behind.append(path.stat().st_size - safe[0])
        save(*args, **keys)

    monkeypatch.setattr(metrics.os, "fsync", watched_fsync)
    monkeypatch.setattr(checkpoints, "save", watched_save)
    train(small, tmp_path)
    assert behind == [0, 0, 0] and safe[0] > 0


@pytest.mark.parametrize("what", ["lock", "claim"])
def test_a_disk_that_is_full_at_the_start_is_one_clear_line(small, tmp_path, monkeypatch, what):
    def fail(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "config.json.tmp")

    monkeypatch.setattr(checkpoints, what, fail)
    with pytest.raises(RuntimeError, match=r"a file could not be written .*No space left") as told:
        train(small, tmp_path)
    assert "\n" not in str(told.value)


def test_a_run_learns_keeps_its_counts_and_is_resumed(trained_vision):
    vision, _, result, run, state = trained_vision
    assert result["warnings"] == [] and np.isfinite(result["test"]["loss"])
    sparse = sparsity.distribution(vision)(run.initial.params)
    masks = dict(_paths.flatten_with_paths(rigl_optax.get_masks(state.opt_state)))
    for path, part in sparse.items():
        assert int(masks[path].sum()) == masks[path].size - int(part * masks[path].size)
    calls = [x for x in jax.tree.leaves(state.model_state) if x.dtype == jnp.int32]
    assert [int(x) for x in calls] == [vision.steps] * 3
