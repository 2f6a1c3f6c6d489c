import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rigl_optax import _paths
from rigl_optax.training import config as config_lib
from rigl_optax.training import methods, optimizers

ROOT = pathlib.Path(__file__).parents[2]
PARAMS = {"kernel": jnp.linspace(-1, 1, 200).reshape(10, 20), "bias": jnp.ones(20)}


def recipe(name, **changes):
    spec = importlib.util.spec_from_file_location(name, ROOT / "configs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = config_lib.from_mapping(module.get_config().to_dict())
    return config_lib.changed(found, changes)


def plan_of(config):
    return methods.plan_of(methods.build(config))


def test_the_imagenet_schedule_is_the_papers():
    config = recipe("imagenet_resnet50")
    rate = optimizers.learning_rate(config)
    # The paper's section 4.1, at a batch of 4,096: the peak is at step 1,564, and drops to a tenth
    # follow at 9,384, 21,895 and 28,151.
    expected = {0: 0, 782: 0.8, 1_564: 1.6, 9_383: 1.6, 9_384: 0.16, 21_894: 0.16, 21_895: 0.016}
    expected |= {28_150: 0.016, 28_151: 0.0016, 31_999: 0.0016}
    for at, value in expected.items():
        assert float(rate(at)) == pytest.approx(value, rel=1e-5, abs=1e-9), at
    assert (
        config.rewire_end == 25_000
        and plan_of(
            config_lib.changed(config, {"method.name": "gmp", "method.every": 1_000})
        ).default.schedule.begin
        == 10_000
    )


def test_the_cifar_schedule_is_the_references():
    # `resnet_train_eval.py` in the reference code's cifar_resnet.
    config = recipe("cifar10_wrn22_2")
    rate = optimizers.learning_rate(config)
    for at, value in {0: 0.1, 29_999: 0.1, 30_000: 0.02, 60_000: 0.004, 90_000: 0.0008}.items():
        assert float(rate(at)) == pytest.approx(value, rel=1e-5), at
    assert config.rewire_end == 75_000 and config.steps == 97_656


@pytest.mark.parametrize("name", ["imagenet_resnet50", "cifar10_wrn22_2"])
def test_training_m_times_as_long_scales_rates_and_t_end_and_nothing_else(name):
    once = recipe(name)
    five = config_lib.changed(once, {"steps": 5 * once.steps})
    rates = optimizers.learning_rate(once), optimizers.learning_rate(five)
    for at in range(0, once.steps, 997):
        assert float(rates[1](5 * at)) == pytest.approx(float(rates[0](at)), rel=1e-3, abs=1e-4)
    assert five.rewire_end == 5 * once.rewire_end
    assert five.method == once.method
    half = jnp.int32(five.rewire_end // 2)
    assert float(plan_of(five).default.drop_fraction(half)) == pytest.approx(0.15)
    pruning = [
        config_lib.changed(c, {"method.name": "gmp", "method.every": 1_000}) for c in (once, five)
    ]
    begins = [plan_of(config).default.schedule.begin for config in pruning]
    assert begins[1] == pytest.approx(5 * begins[0], abs=1_000)


def test_a_cosine_rises_first_and_ends_at_zero(small):
    config = config_lib.changed(
        small, {"steps": 100, "optimizer.warmup": 0.1, "optimizer.learning_rate": 0.4}
    )
    rate = optimizers.learning_rate(config)
    assert [float(rate(t)) for t in (0, 5, 10)] == pytest.approx([0, 0.2, 0.4])
    assert float(rate(55)) == pytest.approx(0.2) and float(rate(100)) == pytest.approx(0, abs=1e-8)
    constant = optimizers.learning_rate(
        config_lib.changed(config, {"optimizer.schedule": "constant", "optimizer.warmup": 0.0})
    )
    assert float(constant(0)) == float(constant(99)) == pytest.approx(0.4)


def test_two_drops_in_one_step_of_a_short_run_are_both_taken(small):
    config = config_lib.changed(
        small,
        {
            "steps": 4,
            "optimizer.schedule": "step",
            "optimizer.decay_at": (0.5, 0.55),
            "optimizer.decay_factor": 0.1,
        },
    )
    rates = [float(optimizers.learning_rate(config)(t)) for t in range(4)]
    assert rates == pytest.approx([0.1, 0.1, 0.001, 0.001])


@pytest.mark.parametrize(
    ("covered", "expected"),
    [
        ("kernels", {"conv/kernel", "depthwise/kernel"}),
        ("kernels_but_depthwise", {"conv/kernel"}),
        ("all", {"conv/kernel", "depthwise/kernel", "norm/scale"}),
    ],
)
@pytest.mark.parametrize("nesterov", [True, False])
def test_what_decays(small, covered, expected, nesterov):
    params = {
        "conv": {"kernel": jnp.ones((1, 1, 2, 2))},
        "depthwise": {"kernel": jnp.ones((3, 3, 1, 2))},
        "norm": {"scale": jnp.ones(2)},
    }
    config = config_lib.changed(
        small,
        {
            "method.name": "dense",
            "optimizer.nesterov": nesterov,
            "optimizer.schedule": "constant",
            "optimizer.weight_decay": 0.5,
            "optimizer.weight_decay_on": covered,
        },
    )
    tx = methods.build(config)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    moved = {path for path, u in _paths.flatten_with_paths(updates) if np.any(u)}
    assert moved == expected
    # Nesterov's first step looks one step ahead: 1 + momentum times the plain one.
    size = 0.1 * 0.5 * (1.9 if nesterov else 1)
    assert float(updates["conv"]["kernel"][0, 0, 0, 0]) == pytest.approx(-size)


def test_weight_decay_leaves_biases_alone(small):
    config = config_lib.changed(
        small, {"method.name": "dense", "optimizer.weight_decay": 1.0, "optimizer.momentum": 0.0}
    )
    tx = methods.build(config)
    zero = jax.tree.map(jnp.zeros_like, PARAMS)
    updates, _ = tx.update(zero, tx.init(PARAMS), PARAMS)
    np.testing.assert_array_equal(updates["bias"], 0)
    np.testing.assert_allclose(
        updates["kernel"], -config.optimizer.learning_rate * PARAMS["kernel"]
    )


@pytest.mark.parametrize("name", ["adamw", "lion", "muon", "prodigy"])
def test_any_optimizer_of_optax_is_found_by_its_name(small, name):
    config = config_lib.changed(small, {"optimizer.name": name, "optimizer.weight_decay_on": "all"})
    state = methods.build(config).init({"kernel": jnp.ones((4, 4))})
    assert state.masks["kernel"].sum() == 4
    with pytest.raises(ValueError, match=f"config.optimizer.mometum: .*for '{name}'"):
        methods.build(config_lib.changed(config, {"optimizer.mometum": 0.9}))
