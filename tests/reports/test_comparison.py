import io
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from rich.console import Console

from rigl_optax.reports import comparison, comparison_figures, figures, summary
from rigl_optax.training import config as config_lib
from rigl_optax.training import costs, files, loop, recovery, score, signals

Arm = comparison.Arm


def result(accuracy, active=100, flops=0.1, seed=0):
    return {
        "config": {"seed": seed},
        "test": {"accuracy": accuracy},
        "active_weights": {"a": active},
        "weights": 1000,
        "flops": {
            "training": flops,
            "training_dense": 1.0,
            "inference": flops,
            "inference_dense": 1.0,
        },
        "warnings": [],
    }


def test_dense_runs_once_for_all_sparsities():
    found = comparison.arms(["dense", "static", "rigl"], [0.9, 0.98])
    assert found == [
        Arm("dense", None),
        Arm("static", 0.9),
        Arm("rigl", 0.9),
        Arm("static", 0.98),
        Arm("rigl", 0.98),
    ]


def test_an_unknown_method_is_refused():
    with pytest.raises(ValueError, match=r"method 'nonesuch'.*rigl"):
        comparison.arms(["nonesuch"], [0.9])


def test_what_cannot_be_trained_is_known_before_the_first_run():
    base = config_lib.from_mapping(
        {"data": {"name": "digits"}, "model": {"name": "wide_resnet", "depth": 10, "width": 0.25}}
    )
    compared = [Arm("static", 0.9), Arm("cht", 0.9)]
    found = comparison.refusals(base, compared)
    assert list(found) == [Arm("cht", 0.9)] and "convolution with a window" in found[compared[1]]


def test_the_time_left_is_that_of_the_runs_that_are_missing():
    assert comparison._left([], 2) == "" and comparison._left([60.0], 0) == ""
    assert comparison._left([100.0, 110.0], 2) == "; 2 runs left, about 4 min"
    assert comparison._left([50.0], 1) == "; 1 run left, about 1 min"


def test_differences_are_paired_by_seed_and_sparsity():
    results = {
        Arm("static", 0.9): [result(0.80), result(0.90, seed=1)],
        Arm("rigl", 0.9): [result(0.82), result(0.89, seed=1)],
        Arm("static", 0.98): [result(0.70), result(0.60, seed=1)],
        Arm("rigl", 0.98): [result(0.75), result(0.65, seed=1)],
    }
    records = {(r["method"], r["sparsity"]): r for r in summary.summary(results)}
    np.testing.assert_allclose(records["rigl", 0.9]["difference"], [2, -1])
    np.testing.assert_allclose(records["rigl", 0.98]["difference"], [5, 5])
    assert "difference" not in records["static", 0.9]
    assert records["rigl", 0.98]["mean"] == pytest.approx(70)
    assert records["rigl", 0.98]["std"] == pytest.approx(np.sqrt(50))
    out = io.StringIO()
    Console(file=out, width=120).print(summary.table(list(records.values()), "title"))
    for text in ("+0.50 ± 2.12", "1/2", "0.100 x"):
        assert text in out.getvalue()


def test_what_costs_more_than_rigl_trains_for_fewer_steps_at_equal_flops(small):
    compared = comparison.arms(["dense", "small_dense", "static", "rigl", "gmp"], [0.8])
    found = comparison.at_equal_flops(small, compared)
    assert [(arm.method, arm.sparsity) for arm in found] == [("dense", 0.8), ("gmp", 0.8)]
    budget = costs.planned(config_lib.changed(small, {"method.name": "rigl"}))
    for _, config, folder in comparison.runs(small, found, 1, pathlib.Path("w")):
        step = costs.planned(config) / config.steps
        assert config.steps < small.steps and folder.parent.name.endswith(f"steps{config.steps}")
        assert abs(costs.planned(config) - budget) < 2 * step
    with pytest.raises(ValueError, match="rigl must be one of them"):
        comparison.at_equal_flops(small, compared[:3])


def test_flops_of_shorter_runs_are_relative_to_those_of_all_steps():
    def run(steps, accuracy):
        found = result(accuracy, flops=1.0)
        return found | {"config": {"seed": 0, "steps": steps}}

    results = {
        Arm("static", 0.9): [run(100, 0.8)],
        Arm("dense", 0.9, steps=25): [run(25, 0.7)],
    }
    shorter = summary.summary(results)[1]
    assert shorter["training_flops"] == 0.25 and shorter["inference_flops"] == 1.0
    assert shorter["difference"] == pytest.approx([-10])
    out = io.StringIO()
    Console(file=out, width=120).print(summary.table(summary.summary(results), "title"))
    assert "dense, 25 steps" in out.getvalue()
    curve = {"curve": [{"step": 25, "loss": 1.0, "accuracy": 0.7}]}
    drawn = comparison_figures.curves(
        {arm: [r | curve for r in each] for arm, each in results.items()}
    )
    assert [curve.method for curve in drawn[0.9]] == ["static"]


def test_one_seed_has_no_spread(tmp_path):
    results = {Arm("static", 0.9): [result(0.80)], Arm("rigl", 0.9): [result(0.82)]}
    records = summary.summary(results, {Arm("rigl", 0.9): [1]})
    assert [record["std"] for record in records] == [None, None]
    out = io.StringIO()
    Console(file=out, width=120).print(summary.table(records, "title"))
    assert "±" not in out.getvalue() and "+2.00" in out.getvalue()
    assert "1 (1 failed)" in out.getvalue() and records[1]["failed"] == [1]
    figures.score_against_cost(records, "title", tmp_path / "a.png", score.ACCURACY)
    assert (tmp_path / "a.png").stat().st_size


def test_records_without_curves_or_workdirs_are_left_out_of_pictures(compared, tmp_path):
    base, arms, workdir, results = compared
    bare = {a: [{k: v for k, v in r.items() if k != "curve"} for r in results[a]] for a in results}
    assert comparison_figures.curves(bare) == {}
    assert comparison_figures.without_curves(bare) == arms
    mixed = bare | {Arm("rigl", 0.8): results[Arm("rigl", 0.8)], Arm("set", 0.8): []}
    assert [curve.method for curve in comparison_figures.curves(mixed)[0.8]] == ["rigl"]
    assert comparison_figures.without_curves(mixed) == arms[:2]
    other = dict(results[arms[2]][0], curve=results[arms[2]][0]["curve"][1:])
    ragged = {arms[2]: [other, results[arms[2]][1]]}
    assert (
        comparison_figures.without_curves(ragged) == arms[2:]
        and comparison_figures.curves(ragged) == {}
    )

    said = []
    found = comparison_figures.connections(base, arms[1:], tmp_path, said.append)
    assert found == {} and len(said) == 2
    assert "static-0.8/seed0: no checkpoint of step 30" in said[0]
    assert not any(tmp_path.iterdir())  # nothing is made where there was nothing


def test_a_record_of_a_ticket_is_good_for_every_workdir(compared, tmp_path, monkeypatch):
    base, arms, _, results = compared
    lottery = [Arm("lottery", 0.8)]
    (_, config, _), *_ = comparison.runs(base, lottery, 1, tmp_path / "there")
    record = dict(results[arms[2]][0], config=config_lib.to_json(config))
    files.write(tmp_path / "lottery-0.8-seed0.json", record)
    monkeypatch.setattr(loop, "train", None)

    def read(base):
        console = Console(file=io.StringIO())
        return comparison.run_all(base, lottery, 1, tmp_path / "here", console, tmp_path)

    assert read(base) == {lottery[0]: [json.loads(json.dumps(record))]}
    other = config_lib.changed(config, {"method.ticket": "there/rigl-0.9/seed0"})
    files.write(tmp_path / "lottery-0.8-seed0.json", record | {"config": config_lib.to_json(other)})
    with pytest.raises(ValueError, match=r"another config \(method.ticket"):
        read(base)


def test_a_run_that_fails_is_noted_and_the_others_go_on(compared, tmp_path, monkeypatch):
    base, arms, _, results = compared
    tried = []

    def train(config, folder, console):
        tried.append((config.method.name, config.seed))
        if config.method.name == "static" and config.seed == 0:
            raise recovery.NonFiniteError("a loss is not finite", 7)
        return results[Arm(config.method.name, None if config.method.name == "dense" else 0.8)][
            config.seed
        ]

    monkeypatch.setattr(loop, "train", train)
    for _ in range(2):
        out = io.StringIO()
        found = comparison.run_all(base, arms, 2, tmp_path, Console(file=out, width=200))
        assert [len(each) for each in found.values()] == [2, 1, 2]
        assert "static-0.8/seed0 failed: a loss is not finite; delete failed.json" in out.getvalue()
        assert comparison.failures(base, arms, 2, tmp_path) == {Arm("static", 0.8): [0]}
    assert tried.count(("static", 0)) == 1  # it would fail again
    with_other = config_lib.changed(base, {"optimizer.learning_rate": 0.01})
    assert comparison.failures(with_other, arms, 2, tmp_path) == {}
    summary_of = summary.summary(found, comparison.failures(base, arms, 2, tmp_path))
    assert [record.get("failed") for record in summary_of] == [None, [0], None]
    assert len(summary_of[2]["difference"]) == 1


def test_of_a_text_lower_is_better():
    def told(bits, seed=0):
        return result(0.5, seed=seed) | {"test": {"accuracy": 0.5, "bits_per_byte": bits}}

    results = {
        Arm("static", 0.9): [told(2.5), told(2.5, seed=1)],
        Arm("rigl", 0.9): [told(2.25), told(2.625, seed=1)],
    }
    static, rigl = summary.summary(results)
    assert rigl["test_bits_per_byte"] == [2.25, 2.625] and rigl["difference"] == [-0.25, 0.125]
    out = io.StringIO()
    Console(file=out, width=120).print(summary.table([static, rigl], "title"))
    for text in ("bits per byte", "2.438 ± 0.265", "-0.062 ± 0.265", "1/2"):
        assert text in out.getvalue()
    assert score.BITS.rank({"bits_per_byte": 2.0}) > score.BITS.rank({"bits_per_byte": 2.1})
    assert score.ACCURACY.rank({"accuracy": 0.9}) > score.ACCURACY.rank({"accuracy": 0.8})


def test_a_record_is_all_that_a_table_and_curves_need(compared, tmp_path, monkeypatch):
    base, arms, workdir, results = compared
    console = Console(file=io.StringIO(), width=120)
    comparison.run_all(base, arms, 2, workdir, console, tmp_path / "records")
    monkeypatch.setattr(loop, "train", None)
    read = comparison.run_all(
        base, arms, 2, tmp_path / "elsewhere", console, tmp_path / "records", train=False
    )
    assert summary.summary(read) == summary.summary(results)
    pairs = zip(
        comparison_figures.curves(read)[0.8], comparison_figures.curves(results)[0.8], strict=True
    )
    for found, expected in pairs:
        for one, other in zip(found[1:], expected[1:], strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.fixture(scope="module")
def compared(tmp_path_factory, small):
    base = config_lib.changed(small, {"steps": 30, "checkpoint.every": 0})
    workdir = tmp_path_factory.mktemp("comparison")
    arms = comparison.arms(["dense", "static", "rigl"], [0.8])
    return base, arms, workdir, run(base, arms, workdir)


def run(base, arms, workdir):
    return comparison.run_all(base, arms, 2, workdir, Console(file=io.StringIO(), width=120))


def test_finished_runs_are_not_run_again(compared, monkeypatch):
    base, arms, workdir, results = compared

    def refuse(*args):
        raise AssertionError("a finished run was run again")

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train", refuse)
        again = run(base, arms, workdir)
    assert json.dumps(list(again.values())) == json.dumps(list(results.values()))


def test_a_finished_run_of_another_config_is_refused(compared):
    base, arms, workdir, _ = compared
    with pytest.raises(ValueError, match=r"another config \(optimizer.learning_rate"):
        run(config_lib.changed(base, {"optimizer.learning_rate": 0.01}), arms, workdir)


def test_curves_have_a_row_for_each_seed(compared):
    results = compared[-1]
    (curves,) = comparison_figures.curves(results).values()
    assert [curve.method for curve in curves] == ["dense", "static", "rigl"]
    assert all(curve.steps.tolist() == [20, 30] for curve in curves)
    assert all(curve.score.shape == (2, 2) for curve in curves)


def test_connections_of_each_pixel_before_and_after(compared):
    base, arms, workdir, results = compared
    (maps,) = comparison_figures.connections(base, arms, workdir).values()
    static, rigl = maps
    active = results[Arm("rigl", 0.8)][0]["active_weights"]["layers/0/kernel"]
    np.testing.assert_array_equal(static.before, static.after)
    np.testing.assert_array_equal(static.before, rigl.before)
    assert (rigl.before != rigl.after).any()
    assert rigl.before.shape == (8, 8) and rigl.before.sum() == rigl.after.sum() == active


def test_pictures_are_written(compared, tmp_path):
    base, arms, workdir, results = compared
    curves = comparison_figures.curves(results)
    figures.learning_curves(curves, "title", tmp_path / "a.png", score.ACCURACY)
    figures.input_connections(
        comparison_figures.connections(base, arms, workdir), "title", tmp_path / "b.png"
    )
    for name in ("a.png", "b.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_a_comparison_that_is_asked_to_stop_ends_with_the_status_of_a_stopped_run(tmp_path):
    code = f"""
import runpy, sys
sys.path.insert(0, "scripts")
from rigl_optax.training import loop, signals
def train(*arguments):
    raise signals.StoppedError("asked to stop: saved at step 3 of 600")
loop.train = train
sys.argv = ["compare.py", "--config=configs/digits_lenet.py", "--workdir={tmp_path}"]
runpy.run_path("scripts/compare.py", run_name="__main__")
"""
    environment = os.environ | {"MALLOC_ARENA_MAX": "4"}  # no new start for huge pages
    command = [sys.executable, "-c", code]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert ended.returncode == signals.STOPPED == 143, ended.stderr
    assert "saved at step 3 of 600; the same command goes on" in ended.stdout
    assert "Traceback" not in ended.stderr
