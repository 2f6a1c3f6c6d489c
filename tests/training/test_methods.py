import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rigl_optax
from rigl_optax.training import checks, methods, setup

PARAMS = {"kernel": jnp.linspace(-1, 1, 200).reshape(10, 20), "bias": jnp.ones(20)}


@pytest.mark.parametrize("name", sorted(methods.METHODS))
def test_every_method_trains_and_does_what_its_entry_says(small, name):
    config = dataclasses.replace(small, method=name, steps=40)
    tx = methods.build(config)
    state = tx.init(PARAMS)
    update = jax.jit(tx.update)
    method = methods.find(config)
    if method.masked:
        start = rigl_optax.get_masks(state)["kernel"]
        assert int(start.sum()) == 40
    params = rigl_optax.apply_masks(PARAMS, state) if method.masked else PARAMS
    generator = np.random.default_rng(0)
    for _ in range(config.steps):
        grads = jax.tree.map(
            lambda p: jnp.asarray(generator.normal(size=p.shape), jnp.float32), params
        )
        updates, state = update(grads, state, params)
        params = jax.tree.map(jnp.add, params, updates)
    if method.masked:
        end = rigl_optax.get_masks(state)["kernel"]
        assert int(end.sum()) == 40
        assert bool((start != end).any()) == method.rewires
        run_state = setup.prepare(config).initial._replace(opt_state=state)
        assert checks.counters(run_state) == (methods.rewirings_before(config, 40), 0)


def test_rewirings_before_counts_the_schedule(small):
    # Ends at 45 = 0.75 * 60: rewirings at 0, 10, 20, 30, 40.
    found = [methods.rewirings_before(small, step) for step in (0, 1, 10, 11, 41, 60)]
    assert found == [0, 1, 1, 2, 5, 5]
    assert methods.rewirings_before(dataclasses.replace(small, method="static"), 60) == 0


def test_growth_predicate_agrees_with_the_counts(small):
    predicate = methods.growth_predicate(small)
    steps = [step for step in range(small.steps) if predicate(jnp.int32(step))]
    assert len(steps) == methods.rewirings_before(small, small.steps)
    assert methods.growth_predicate(dataclasses.replace(small, method="set")) is None


def test_weight_decay_leaves_biases_alone(small):
    config = dataclasses.replace(small, method="dense", weight_decay=1.0, momentum=0.0)
    tx = methods.build(config)
    zero = jax.tree.map(jnp.zeros_like, PARAMS)
    updates, _ = tx.update(zero, tx.init(PARAMS), PARAMS)
    np.testing.assert_array_equal(updates["bias"], 0)
    np.testing.assert_allclose(updates["kernel"], -config.learning_rate * PARAMS["kernel"])


@pytest.mark.parametrize(
    ("key", "exists"),
    [("method", "rigl"), ("distribution", "erk"), ("model", "lenet"), ("dataset", "digits")],
)
def test_an_unknown_name_is_refused_with_those_that_exist(small, key, exists):
    config = dataclasses.replace(small, **{key: "nonesuch"})
    with pytest.raises(ValueError, match=f"config.{key}='nonesuch'.*{exists}"):
        setup.prepare(config)
