"""Iterative hard thresholding: all arrays on request, what is forgotten, what units keep."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import rigl_optax

SHAPES = {"embedding": (60, 40), "kernel": (40, 50), "bias": (50,), "scale": (1000,)}


def some_tree(seed):
    rng = np.random.default_rng(seed)
    return {n: rng.standard_normal(s).astype(np.float32) for n, s in SHAPES.items()}


def everything(sparsity):
    return rigl_optax.uniform(sparsity, dense=rigl_optax.nothing_dense)


def trained(tx, steps):
    params = some_tree(0)
    state = tx.init(params)
    update = jax.jit(tx.update)
    for t in range(steps):
        updates, state = update(some_tree(100 + t), state, params)
        params = optax.apply_updates(params, updates)
        yield jax.device_get((params, state))


def test_all_arrays_at_the_highest_sparsity_and_nothing_else_is_kept():
    tx = rigl_optax.iterative_hard_thresholding(optax.adamw(0.1), everything(0.999), end=4)
    for t, (params, state) in enumerate(trained(tx, 6)):
        for n, shape in SHAPES.items():
            size = int(np.prod(shape))
            zeros = int(0.999 * size) * (min(t, 3) * 2**15 // 3) // 2**15
            assert state.masks[n].sum() == np.count_nonzero(params[n]) == size - zeros
            # The optimizer is dense; weights are forgotten while they are inactive.
            assert (state.inner_state[0].mu[n] != 0).all()
        assert not jax.tree.leaves(state.shadow)


def test_an_inactive_weight_comes_back_by_one_large_step_from_zero():
    tx = rigl_optax.iterative_hard_thresholding(optax.sgd(1.0), everything(0.5), end=1)
    params = {"w": jnp.array([5.0, 4.0, 3.0, 2.0])}
    state = tx.init(params)
    for gradient, expected in (
        ([0.0, 0, 0, 0], [5.0, 4, 0, 0]),
        ([0, 0, -3.5, 0], [5, 4, 0, 0]),  # not from 3: it starts at 0 again
        ([0, 0, -3.5, -6], [5, 0, 0, 6]),
    ):
        updates, state = tx.update({"w": jnp.array(gradient)}, state, params)
        params = optax.apply_updates(params, updates)
        assert params["w"].tolist() == expected


def test_units_keep_their_largest_inputs():
    layers = rigl_optax.uniform(0.95)
    tx = rigl_optax.iterative_hard_thresholding(optax.sgd(0.1), layers, end=3, min_fan_in=2)
    *_, (params, state) = trained(tx, 5)
    assert state.masks["kernel"].sum() == 100 and state.masks["embedding"].all()
    assert (np.count_nonzero(params["kernel"], axis=0) == 2).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda s: {"sparsity": s, "min_fan_in": 3}, "min_fan_in=3: 'kernel' has 100 active"),
        (lambda s: {"sparsity": None}, "sparsity=None"),
        (lambda s: {"sparsity": s, "initial_sparsity": 0.97}, "initial_sparsity=0.97"),
        (lambda s: {"sparsity": s, "every": 0}, "every=0"),
    ],
)
def test_bad_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        arguments = {"end": 3} | make(rigl_optax.uniform(0.95))
        rigl_optax.iterative_hard_thresholding(optax.sgd(0.1), **arguments).init(some_tree(0))
