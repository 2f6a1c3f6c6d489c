import functools
import io
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

import rigl_optax
from rigl_optax import accounting
from rigl_optax.training import (
    checkpoints,
    checks,
    costs,
    files,
    loop,
    methods,
    metrics,
    setup,
    sparsity,
)
from rigl_optax.training import config as config_lib

PARAMS = {"kernel": jnp.linspace(-1, 1, 200).reshape(10, 20), "bias": jnp.ones(20)}


def finished(config, workdir):
    return loop.train(config, workdir, Console(file=io.StringIO(), width=120))


def rewirings(config):
    return setup.prepare(config).rewirings


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """`trained(config) -> (workdir, result)`: each config is trained once, for all tests."""

    @functools.cache
    def train(config):
        workdir = tmp_path_factory.mktemp("run")
        return workdir, finished(config, workdir)

    return train


@pytest.fixture(scope="module")
def ticket(trained, small):
    workdir, result = trained(small)
    return str(workdir), result


def named(small, name, ticket):
    needs = methods.METHODS[name].start == "ticket"
    return config_lib.changed(
        small, {"method.name": name, "method.ticket": ticket[0] if needs else ""}
    )


@pytest.mark.parametrize("name", sorted(methods.METHODS))
def test_every_method_trains_and_does_what_its_entry_says(small, ticket, trained, name):
    config, method = named(small, name, ticket), methods.METHODS[name]
    (workdir, result), run = trained(config), setup.prepare(config)
    assert result["warnings"] == []
    assert result["test"]["accuracy"] > 0.15
    if not method.narrow:
        told = files.read(workdir / loop.EXPLANATION_FILE, "", files.EXPLANATION)
        assert told["rewirings"] == run.rewirings.before(config.steps)
        flops = result["flops"]
        if name not in ("str", "dsr", "snfs_redistribute", "gmp_global", "granet"):
            # The rest are decided in training.
            spent = flops["training"] / flops["training_dense"]
            assert told["training_ratio"] == pytest.approx(spent, rel=1e-2)
            assert told["inference_ratio"] == flops["inference"] / flops["inference_dense"]
    assert (result["coverage"] is not None) == run.rewirings.happen
    with checkpoints.read_checkpoints(workdir) as saved:
        state = checkpoints.restore_newest(saved, run.abstract, print)
    if not method.masked:
        return
    at_start = checks.active_weights(run, run.initial)
    assert {layer["path"]: layer["active"] for layer in told["layers"]} == at_start
    first, last = (rigl_optax.get_masks(s.opt_state) for s in (run.initial, state))
    changed = [
        bool((a != b).any()) for a, b in zip(*map(jax.tree.leaves, (first, last)), strict=True)
    ]
    assert any(changed) == run.rewirings.happen
    for mask, weights in zip(*map(jax.tree.leaves, (last, state.params)), strict=True):
        assert not np.asarray(weights)[~np.asarray(mask)].any()
    counts = [checks.active_weights(run, s) for s in (run.initial, state)]
    if method.keeps_counts:
        assert counts[0] == counts[1]
    wanted = sum(ticket[1]["active_weights"].values())
    if name == "spdf":
        wanted = sum(mask.size for mask in jax.tree.leaves(last))
    if name != "str":  # what that comes to is learned
        assert sum(counts[1].values()) == wanted
    assert checks.counters(state) == (run.rewirings.before(config.steps), 0)


@pytest.mark.parametrize("name", ["gmp_global", "str", "deepr", "snfs_redistribute", "top_kast"])
def test_a_run_that_is_resumed_ends_the_same(small, trained, tmp_path, name):
    resumed_and_whole(config_lib.changed(small, {"method.name": name}), trained, tmp_path)


def test_a_run_that_ablates_units_keeps_its_counts_and_can_be_resumed(small, trained, tmp_path):
    layers = (
        ("layers/[01]", {"name": "constant_fan_in", "min_salient": 0.7}),
        ("layers/2", {"name": "constant_fan_in"}),
    )
    config = config_lib.changed(
        small, {"method.structure": {"layers": layers}, "method.drop_fraction": 0.5}
    )
    result, state = resumed_and_whole(config, trained, tmp_path)
    run = setup.prepare(config)
    assert checks.active_weights(run, state) == checks.active_weights(run, run.initial)
    ablated = {p: n for p, n in checks.dead_units(run, state).items() if n}
    assert ablated and ablated.keys() <= {"layers/0/kernel", "layers/1/kernel"}
    assert any("units are ablated" in warning for warning in result["warnings"])
    assert not any("have lost all their inputs" in warning for warning in result["warnings"])


def resumed_and_whole(config, trained, tmp_path):
    """Result and state of a run that ends the same in one go and when it is resumed."""
    (whole, expected), parts = trained(config), tmp_path / "parts"
    shutil.copytree(whole, parts)
    with checkpoints.open_checkpoints(parts, 2) as saved:
        steps = [c.step for c in saved.checkpoints]
    shutil.rmtree(parts / "checkpoints" / str(steps[-1]))  # as if killed just before the last
    found = finished(config, parts)
    for key in ("test", "active_weights", "flops", "coverage"):
        assert found[key] == expected[key]
    states = []
    for folder in (whole, parts):
        with checkpoints.read_checkpoints(folder) as saved:
            states.append(checkpoints.restore_newest(saved, setup.prepare(config).abstract, print))
    for a, b in zip(*map(jax.tree.leaves, states), strict=True):
        np.testing.assert_array_equal(a, b)
    return expected, states[0]


def test_tickets_are_the_masks_of_the_finished_run(small, ticket):
    config = named(small, "lottery", ticket)
    run = setup.prepare(config)
    masks = rigl_optax.get_masks(run.initial.opt_state)
    assert checks.active_weights(run, run.initial) == ticket[1]["active_weights"]
    start = setup.prepare(small).initial
    assert any(
        bool((a != b).any())
        for a, b in zip(
            *map(jax.tree.leaves, (masks, rigl_optax.get_masks(start.opt_state))), strict=True
        )
    )
    cost = costs.TrainingFlops(run, run.initial).total().training
    static = setup.prepare(config_lib.changed(small, {"method.name": "static"}))
    alone = costs.TrainingFlops(static, static.initial)
    assert cost == pytest.approx(alone.total().training + ticket[1]["flops"]["training"])


def test_training_flops_follow_the_masks(small, trained):
    config = config_lib.changed(small, {"method.name": "gmp"})
    workdir, result = trained(config)
    records = [r for r in metrics.read(workdir / metrics.FILE) if metrics.FORWARD_FLOPS in r]
    assert [r["step"] for r in records] == [16, 26, 36, 46]
    forward = [result["flops"]["inference_dense"], *(r[metrics.FORWARD_FLOPS] for r in records)]
    assert forward == sorted(forward, reverse=True)
    steps = np.diff([0, 16, 26, 36, 46, 60])
    assert result["flops"]["training"] == 3 * config.batch_size * np.dot(forward, steps)
    assert result["flops"]["inference"] == forward[-1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method.mometum": 0.9}, "config.method.mometum: .*for 'rigl' accumulate, .*min_fan_in"),
        ({"method.end": 3}, "config.method.end: there is no such key"),
        ({"method.name": "dense", "method.accumulate": 2}, "and for 'dense' none more"),
        ({"method.grown": 3}, "config.method.grown=3: must be a section with keys of value, "),
        ({"method.structure": 3}, "config.method.structure=3: must be a section"),
        ({"method.structure": {"name": "blocks"}}, "must be one of unstructured, block, nm"),
        ({"method.structure": {"name": "block", "rows": 2}}, "missing .*'cols'"),
        (
            {"method.structure": {"name": "nm", "k": 2}},
            "structure.k: .*for 'nm' m, n",
        ),
        ({"method.structure": {"layers": (("1", 3),)}}, "structure.layers=3: must be a section"),
        (
            {"method.structure": {"name": "block", "rows": 2, "cols": 0}},
            "cols=0: must be an integer",
        ),
        (
            {"method.structure": {"name": "constant_fan_in", "min_salient": 2}},
            "min_salient=2.0: must be a number from 0",
        ),
        (
            {
                "method.name": "gmp",
                "method.structure": {"name": "constant_fan_in", "min_salient": 0.3},
            },
            "this method ablates no units",
        ),
        (
            {"method.structure": {"name": "block", "rows": 2, "cols": 3}},
            "'layers/0/kernel' of 64 inputs x 20 outputs",
        ),
        (
            {"method.name": "str", "method.structure": {"name": "block", "rows": 2, "cols": 2}},
            "str decides on single.*static, snip",
        ),
        (
            {"method.name": "deepr", "method.structure": {"name": "block", "rows": 2, "cols": 2}},
            "'layers/0/kernel' has Block.*no sign",
        ),
        ({"method.ticket": "somewhere"}, "rigl takes none"),
        ({"method.name": "lottery"}, "give its workdir"),
        ({"method.name": "lottery", "method.ticket": "nowhere"}, "'nowhere'.*give its workdir"),
    ],
)
def test_options_and_tickets_that_do_not_fit_are_refused(small, changes, message):
    with pytest.raises(ValueError, match=message):
        setup.prepare(config_lib.changed(small, changes))


def test_options_reach_the_method(small):
    config = config_lib.changed(small, {"method.accumulate": 3, "method.gradient_step": True})
    assert methods.options(config) == {"accumulate": 3, "gradient_step": True}
    assert setup.prepare(config).initial.opt_state.memory.gradients != ()


def test_a_structure_reaches_the_masks(small):
    layers = (
        ("layers/0", {"name": "block", "rows": 4, "cols": 5, "pool_by": "l2"}),
        ("layers/1", {"name": "block", "rows": 2, "cols": 10}),
    )
    config = config_lib.changed(small, {"method.structure": {"layers": layers}})
    masks = rigl_optax.get_masks(setup.prepare(config).initial.opt_state)
    first = np.asarray(masks["layers"][0]["kernel"]).reshape(16, 4, 4, 5).mean((1, 3))
    second = np.asarray(masks["layers"][1]["kernel"]).reshape(10, 2, 10).mean((1, 2))
    assert set(first.flat) == set(second.flat) == {0, 1}
    assert sparsity.structures(small) == rigl_optax.Unstructured()


def test_new_weights_and_drop_schedules_follow_the_config(small):
    grown = {"optimizer_state": "mean_second_moment", "value": "normal", "divisor": 10.0}
    config = config_lib.changed(
        small, {"method.grown": grown, "method.drop_schedule": "constant", "optimizer.name": "adam"}
    )
    assert methods.options(config) == {"grown": rigl_optax.Grown(**grown)}
    assert rewirings(config).drop_fractions(30, []) == {"drop_fraction": pytest.approx(0.3)}
    linear = config_lib.changed(small, {"method.drop_schedule": "linear"})
    assert rewirings(linear).drop_fractions(15, []) == {"drop_fraction": pytest.approx(0.2)}
    stages = rewirings(config_lib.changed(small, {"method.drop_schedule": "stages"}))
    found = [stages.drop_fractions(t, [])["drop_fraction"] for t in (0, 14, 15, 29, 30, 44)]
    assert found == pytest.approx([0.3, 0.3, 0.15, 0.15, 0.075, 0.075])


def test_rewirings_before_counts_the_schedule(small):
    # Ends at 45 = 0.75 * 60: rewirings at 0, 10, 20, 30, 40.
    found = [rewirings(small).before(step) for step in (0, 1, 10, 11, 41, 60)]
    assert found == [0, 1, 1, 2, 5, 5]
    assert rewirings(config_lib.changed(small, {"method.name": "static"})).before(60) == 0


def test_growth_predicate_agrees_with_the_counts(small):
    predicate = rewirings(small).growth_predicate
    steps = [step for step in range(small.steps) if predicate(jnp.int32(step))]
    assert len(steps) == rewirings(small).before(small.steps)
    assert rewirings(config_lib.changed(small, {"method.name": "set"})).growth_predicate is None


def test_what_was_used_is_recorded_and_counted(small):
    named = {
        "rigl_itop": (0.3, 0.5, 2),  # what that method has instead of the config's
        "rigl": (0.1, 0.1, 5),
        "granet": (0.3, 0.3, 5),
    }
    for method, (given, first, dense) in named.items():
        changes = {"method.name": method, "method.drop_fraction": given}
        config = config_lib.changed(small, changes)
        assert rewirings(config).drop_fractions(0, ["a"]) == {"drop_fraction": pytest.approx(first)}
        assert rewirings(config).plan.dense_gradients_before(60) == dense
    config = config_lib.changed(small, {"method.accumulate": 4})
    assert (
        rewirings(config).plan.dense_gradients_before(60) == 1 + 4 * 4
    )  # one call before the first
    assert (
        rewirings(config_lib.changed(small, {"method.name": "gmp"})).drop_fractions(20, ["a"]) == {}
    )


def test_costs_of_a_method_are_those_of_accounting():
    for name, method in methods.METHODS.items():
        assert method.cost is accounting.METHODS[name]
    assert accounting.METHODS.keys() - methods.METHODS.keys() == {"pruning"}  # the paper's name


@pytest.mark.parametrize(
    ("key", "exists"),
    [
        ("method.name", "rigl"),
        ("method.distribution.name", "erk"),
        ("model.name", "lenet"),
        ("data.name", "digits"),
        ("optimizer.name", "adamw, .*sgd"),
    ],
)
def test_an_unknown_name_is_refused_with_those_that_exist(small, key, exists):
    with pytest.raises(ValueError, match=f"config.{key}='nonesuch'.*{exists}"):
        setup.prepare(config_lib.changed(small, {key: "nonesuch"}))
