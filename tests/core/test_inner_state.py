"""Counts of steps that an optimizer keeps for each weight, over rewirings."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import rigl_optax
from rigl_optax import Block, Grown, condensed, uniform


class State(NamedTuple):
    steps: Any  # int16, of each weight
    total: Any  # of all
    average: Any


def counting():
    """Moves a weight by its gradient over the number of steps it has taken."""

    def init(params):
        steps = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.int16), params)
        return State(steps, jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, params))

    def update(grads, state, params=None):
        del params
        steps = jax.tree.map(lambda n: n + jnp.int16(1), state.steps)
        moves = jax.tree.map(lambda g, n: -0.1 * g / n.astype(g.dtype), grads, steps)
        average = jax.tree.map(lambda a, g: 0.5 * a + 0.5 * g, state.average, grads)
        return moves, State(steps, state.total + 1, average)

    return optax.GradientTransformation(init, update)


def some_tree(seed):
    rng = np.random.default_rng(seed)
    return {
        "kernel": rng.standard_normal((12, 8)).astype(np.float32),
        "bias": rng.standard_normal(8).astype(np.float32),
    }


@pytest.mark.parametrize(
    "options",
    [{}, {"gradient_step": True}, {"grown": Grown(gradient_scale=3.0)}],
    ids=["replaces the step", "steps too", "grown"],
)
def test_a_count_of_steps_goes_on_where_a_weight_stays_and_starts_where_it_is_new(options):
    tx = rigl_optax.rigl(counting(), uniform(0.5), end=20, every=3, **options)
    params = some_tree(0)
    state = tx.init(params)
    params = rigl_optax.apply_masks(params, state)
    update = jax.jit(tx.update)
    active_for = np.zeros((12, 8), np.int16)
    for t in range(8):
        before = np.asarray(state.masks["kernel"])
        grads = some_tree(100 + t)
        if t == 6:  # fails: the topology stays, counters go on
            grads["kernel"][0, 0] = np.nan
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        after = np.asarray(state.masks["kernel"])
        steps = np.asarray(state.inner_state.steps["kernel"])
        active_for = np.where(before & after, active_for + 1, 0)
        np.testing.assert_array_equal(steps[after], active_for[after])
        if t % 3 == 0:
            assert not steps[~after].any()
            assert (before == after).all() == (t == 6)
        assert steps.dtype == np.int16
        np.testing.assert_array_equal(state.inner_state.steps["bias"], t + 1)
        assert int(state.inner_state.total) == t + 1
        assert np.isfinite(jax.tree.leaves(params)[1]).all()


def test_a_count_of_steps_moves_with_the_block_it_belongs_to():
    topologies = {"kernel": condensed.random_topology((8, 8), 0.5, Block(2, 2))}
    weights = {"kernel": jnp.ones(topologies["kernel"].values_shape), "bias": jnp.ones(8)}
    tx = condensed.rigl(counting(), end=20, every=3)
    state = tx.init(weights, topologies)
    rng = np.random.default_rng(0)

    def loss(kernels, x):
        return jnp.sum((x @ kernels["kernel"] + kernels["bias"]) ** 2)

    step = condensed.value_grad_and_scores(loss)
    active_for = np.zeros((8, 8), np.int16)
    for t in range(8):
        x = jnp.asarray(rng.standard_normal((4, 8)), jnp.float32)
        _, grads, scores = step(weights, state.topologies, x)
        before = np.asarray(condensed.masks_of(weights, state.topologies)["kernel"])
        if tx.is_rewiring_step(state.count):
            weights, state = tx.rewire(grads, scores, state, weights)
        else:
            updates, state = tx.update(grads, state, weights)
            weights = optax.apply_updates(weights, updates)
        after = np.asarray(condensed.masks_of(weights, state.topologies)["kernel"])
        assert (before == after).all() == (t % 3 != 0)
        active_for = np.where(before & after, active_for + 1, 0)
        steps = state.inner_state.steps
        dense = np.asarray(condensed.densify(steps, state.topologies)["kernel"])
        np.testing.assert_array_equal(dense[after], active_for[after])
        np.testing.assert_array_equal(steps["bias"], t + 1)
