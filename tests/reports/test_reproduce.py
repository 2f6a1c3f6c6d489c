"""Claims are trained once, go on where they were interrupted, and say what their records say."""

import dataclasses
import json

import numpy as np
import pytest

from rigl_optax.reports import comparison, summary
from rigl_optax.reports.comparison import Arm
from rigl_optax.reports.reproduce import claims, page, trials
from rigl_optax.training import config as config_lib
from rigl_optax.training import display, files, loop, methods, signals, tasks
from rigl_optax_cli import reproduce


@pytest.fixture
def claim(small, monkeypatch):
    """A claim of two arms on a tiny network; a run takes a second."""
    experiment = claims.Experiment(
        "digits",
        "tiny",
        config_lib.to_json(small),
        (Arm("static", 0.8), Arm("rigl", 0.8)),
        rates=(0.05, 0.1),
        seeds=1,
    )
    found = claims.Claim("tiny", "A tiny claim", "nothing", (experiment,))
    monkeypatch.setattr(claims, "CLAIMS", {"tiny": found})
    return found


@pytest.fixture
def trained(monkeypatch):
    """The configs of the runs that are trained, in order; the third is stopped at first."""
    real, seen = loop.train, []

    def train(config, folder, console):
        if len(seen) == 2 and "stopped" not in seen:
            seen.append("stopped")
            raise signals.StoppedError("asked to stop: saved at step 3 of 60", signals.STOPPED)
        seen.append((config.method.name, config.optimizer.learning_rate, config.seed))
        return real(config, folder, console)

    monkeypatch.setattr(loop, "train", train)
    return seen


def run(tmp_path, *options):
    folders = (f"--workdir={tmp_path / 'runs'}", f"--records={tmp_path / 'records'}")
    return reproduce.main(["tiny", *folders, *options])


def test_a_claim_that_was_stopped_does_only_what_is_left(claim, trained, tmp_path, capsys):
    assert run(tmp_path) == signals.STOPPED
    assert "the same command goes on" in capsys.readouterr().out
    assert run(tmp_path) == 0
    done = [each for each in trained if each != "stopped"]
    tuning = [
        (name, rate, claims.TUNING_SEED) for name in ("static", "rigl") for rate in (0.05, 0.1)
    ]
    assert done[:4] == tuning and [(name, seed) for name, _, seed in done[4:]] == [
        ("static", 0),
        ("rigl", 0),
    ]
    records = tmp_path / "records" / "tiny" / "digits"
    chosen = {}
    for name in ("static", "rigl"):
        accuracy = {
            rate: json.loads(
                (records / "tuning" / f"{name}-0.8-rate-{rate}-seed100.json").read_text()
            )["validation"]["accuracy"]
            for rate in (0.05, 0.1)
        }
        chosen[name] = max(accuracy, key=accuracy.get)
    assert {name: rate for name, rate, seed in done if seed == 0} == chosen
    out = capsys.readouterr().out
    assert "[1/4] static, rate 0.05 0.8 seed 100: validation accuracy" in out
    assert "left, about 1 min" in out
    table = (tmp_path / "runs" / "tiny" / "table.md").read_text()
    result = json.loads((records / "rigl-0.8-seed0.json").read_text())
    assert f"| RigL | {100 * result['test']['accuracy']:.2f} |" in table
    assert result["machine"]["versions"]["jax"] and result["effective_units"]["layers/0/kernel"] > 1
    assert (tmp_path / "runs" / "tiny" / "figure.png").stat().st_size > 5_000
    # From the records alone, elsewhere: nothing is trained, and the table is the same.
    elsewhere = (f"--workdir={tmp_path / 'else'}", f"--records={tmp_path / 'records'}")
    assert reproduce.main(["tiny", *elsewhere, "--notrain"]) == 0
    assert (tmp_path / "else" / "tiny" / "table.md").read_text() == table
    assert len(trained) == 7


def test_a_quick_claim_leaves_no_records(claim, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert reproduce.main(["tiny", "--quick"]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"runs"}
    (found,) = tmp_path.glob("runs/reproduce/quick/records/tiny/digits/rigl-*.json")
    assert json.loads(found.read_text())["config"]["steps"] == claims._QUICK["steps"]


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["nonesuch"], "'nonesuch': claims are methods, longer, distributions"),
        ([], "which claim? Give, as the first word, one of methods, "),
        (["methods", "--task=none"], "--task=none: tasks of methods are digits, fashion_mnist"),
        (["methods", "--seeds=0"], "flag --seeds=0: 0 is not a positive integer"),
        (["methods", "--seeds=x"], "flag --seeds=x: "),
        (["methods", "--task=digits", "--sparsities=.5"], "--sparsities=.5: those of digits are"),
        (["methods", "--sparsities=a"], "--sparsities=a: must be numbers"),
        (["methods", "--bogus"], "Unknown command line flag 'bogus'"),
        (["methods", "--notrain", "--records=/nowhere"], "no run of methods has a result yet"),
    ],
)
def test_mistakes_are_one_line_and_status_2(argv, told, capsys):
    status = reproduce.main(argv)
    (line,) = capsys.readouterr().err.splitlines()
    assert status == 2 and told in line


def test_all_claims_are_listed(capsys):
    assert reproduce.main(["--list"]) == 0
    out = capsys.readouterr().out
    for name, claim in claims.CLAIMS.items():
        assert f"{name}: {claim.title}" in out
    assert "  digits: 31 arms, 5 seeds, 3 rates: 248 runs" in out


@pytest.mark.parametrize("name", list(claims.CLAIMS))
def test_every_arm_is_sound_and_has_a_folder_of_its_own(name, tmp_path):
    for experiment in claims.CLAIMS[name].experiments:
        for each in (experiment, experiment.quick()):
            folders = [folder for *_, folder in comparison.runs(each.base, each.arms, 1, tmp_path)]
            assert len(set(folders)) == len(each.arms) > 1
            for arm, config, _ in comparison.runs(each.base, each.arms, 1, tmp_path):
                tasks.check(config)
                methods.build(config)
                assert experiment.tuned_as(arm).sparsity == arm.sparsity
        named = {(arm.method, arm.name) for arm in experiment.arms}
        assert named >= {experiment.baseline(arm) for arm in experiment.arms}


def result(accuracy, seed, units=30.0):
    flops = {"training": 2.0, "training_dense": 8.0, "inference": 1.0, "inference_dense": 4.0}
    return {
        "config": {"seed": seed, "steps": 60},
        "validation": {"accuracy": accuracy, "loss": 1.0},
        "test": {"accuracy": accuracy, "loss": 1.0},
        "active_weights": {"w": 5},
        "effective_units": {"w": units},
        "weights": 20,
        "flops": flops,
        "coverage": None,
        "warnings": [],
    }


def test_the_table_is_what_the_records_say(claim):
    (experiment,) = claim.experiments
    static, rigl, dense = Arm("static", 0.8), Arm("rigl", 0.8), Arm("dense", None)
    experiment = dataclasses.replace(experiment, seeds=3)
    results = {
        dense: [result(0.99, 0) | {"effective_units": {}}],
        static: [result(0.80, 0), result(0.90, 1), result(0.85, 2)],
        rigl: [result(0.82, 0, 10.0), result(0.89, 1, 20.0)],
    }
    rates = {dense: 0.1, static: 0.05, rigl: 0.2}
    found = trials.Found(results, {rigl: [2]}, rates)
    assert page.table({experiment: found}).splitlines() == [
        "**tiny.** Test accuracy (%), mean ± standard deviation of 1 to 3 seeds. The learning rate "
        "of each arm at each sparsity is the best of 0.05, 0.1 on validation data, in 1 run each "
        "from seed 100 on, which are not in the table.",
        "",
        "| dense: 99.00 | 80 % |",
        "|---|---|",
        "| static | 85.00 ± 5.00 |",
        "| RigL | 85.50 ± 4.95 (1 failed) |",
        "",
        "Minus static, paired by seed; in brackets the seeds that are ahead:",
        "",
        "|  | 80 % |",
        "|---|---|",
        "| RigL | +0.50 ± 2.12 (1/2) |",
        "",
        "Learning rate, training FLOPs (dense: 1), effective units of the first layer, of 300, and "
        "the part of the weights that was ever active:",
        "",
        "| dense: 0.1, 0.250 | 80 % |",
        "|---|---|",
        "| static | 0.05, 0.250, 30 units |",
        "| RigL | 0.2, 0.250, 15 units |",
    ]


def test_what_was_tried_is_held_against_the_score():
    tried = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]
    scores = [90.0, 91.0, 90.5, 92.0, 91.5, 93.0, 92.5, 94.0]
    one = {"method": "rigl", "sparsity": 0.98}
    rows = [one | {"coverage": a, "mean": b} for a, b in zip(tried, scores, strict=True)]
    r = np.corrcoef(tried, scores)[0, 1]
    (line, _) = page.explored(rows)
    assert line == f"Over these 8 arms the correlation of that part with the score is +{r:.2f}."
    assert page.explored(rows[1:]) == []  # too few
    assert page.explored([*rows, {**rows[0], "sparsity": 0.9}]) == []
    assert page.explored([*rows, {"method": "dense", "sparsity": None, "mean": 97.0}])


def test_flops_of_other_batches_are_relative_to_as_many_examples():
    plain = result(0.9, 0) | {"config": {"seed": 0, "steps": 60, "batch_size": 100}}
    small = result(0.9, 0) | {"config": {"seed": 0, "steps": 120, "batch_size": 50}}
    longer = result(0.9, 0) | {"config": {"seed": 0, "steps": 120, "batch_size": 100}}
    arms = [
        Arm("rigl", 0.8),
        Arm("rigl", 0.8, steps=120, name="of 50"),
        Arm("rigl", 0.8, steps=120),
    ]
    results = dict(zip(arms, ([plain], [small], [longer]), strict=True))
    assert [row["training_flops"] for row in summary.summary(results)] == [0.25, 0.25, 0.5]


def test_rates_are_chosen_on_validation_data():
    arm, other = Arm("rigl", 0.9), Arm("static", 0.9)
    low, high = result(0.8, 100), result(0.9, 100)
    found = {
        (arm, 0.1): [low, high],
        (arm, 0.2): [high, high],
        (arm, 0.4): [high],  # the other seed has failed
        (other, 0.1): [high, low],
        (other, 0.2): [low, high],
        (Arm("set", 0.9), 0.1): [],
    }
    assert trials.best_rates(found) == {arm: 0.2, other: 0.1}  # of equals the lower


def test_a_ticket_is_of_the_arm_that_is_compared(small, tmp_path):
    rate = ("optimizer.learning_rate", 0.3)
    arms = [Arm("rigl", 0.8, changes=(rate,)), Arm("lottery", 0.8)]
    (_, rigl, folder), (_, lottery, _) = comparison.runs(small, arms, 1, tmp_path)
    assert lottery.method.ticket == str(folder)
    assert rigl.optimizer.learning_rate == 0.3 and lottery.optimizer.learning_rate == 0.1
    tried = []

    def train(config, workdir, console):
        tried.append((config.method.name, config.optimizer.learning_rate, workdir))
        return result(0.5, 0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "train", train)
        comparison.run_all(small, arms[1:], 1, tmp_path, display.make_console())
        alone = [each[:2] for each in tried]
        tried.clear()
        ended = result(0.5, 0) | {"config": config_lib.to_json(rigl)}
        files.write(folder / "result.json", ended)
        comparison.run_all(small, arms, 1, tmp_path, display.make_console())
    assert alone == [("rigl", 0.1), ("lottery", 0.1)]
    assert [each[0] for each in tried] == ["lottery"]  # the ticket is the arm's run
