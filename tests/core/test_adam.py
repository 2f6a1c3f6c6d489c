import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import rigl_optax

SHAPES = {"a": (12, 10), "b": (10,)}


def tree(seed):
    rng = np.random.default_rng(seed)
    return {n: jnp.asarray(rng.standard_normal(s), jnp.float32) for n, s in SHAPES.items()}


def run(tx, steps, params=None):
    params = tree(0) if params is None else params
    state, update = tx.init(params), jax.jit(tx.update)
    seen = []
    for t in range(steps):
        updates, state = update(tree(1 + t), state, params)
        params = optax.apply_updates(params, updates)
        seen.append((params, state, updates))
    return seen


@pytest.mark.parametrize("keys", [{}, {"b1": 0.8, "b2": 0.95, "eps_root": 1e-6, "warmup": 0}])
def test_alone_it_is_the_adam_of_optax_bit_for_bit(keys):
    theirs = {k: v for k, v in keys.items() if k != "warmup"}
    pairs = zip(
        run(rigl_optax.adamw(1e-2, **keys), 40), run(optax.adamw(1e-2, **theirs), 40), strict=True
    )
    for (mine, _, _), (other, _, _) in pairs:
        for name in SHAPES:
            np.testing.assert_array_equal(mine[name], other[name])


def test_masks_that_stay_change_nothing_either():
    ours = run(rigl_optax.static_sparse(rigl_optax.adamw(1e-2), 0.5), 20)
    theirs = run(rigl_optax.static_sparse(optax.adamw(1e-2), 0.5), 20)
    for name in SHAPES:
        np.testing.assert_array_equal(ours[-1][0][name], theirs[-1][0][name])


def test_a_young_weight_has_a_bias_correction_and_a_warm_up_of_its_own():
    b1, b2, warmup = 0.9, 0.999, 4
    tx = rigl_optax.scale_by_adam(b1, b2, eps=0.0, warmup=warmup)
    state = tx.init({"w": jnp.zeros(3)})
    # Long trained; the second weight is new, the third has taken two steps.
    old = state._replace(
        count=jnp.int32(500),
        age={"w": jnp.array([500, 0, 2], jnp.int16)},
        mu={"w": jnp.array([0.1, 0.0, 0.05])},
        nu={"w": jnp.array([0.04, 0.0, 0.001])},
    )
    g = np.array([0.3, -0.2, 0.1])
    updates, new = tx.update({"w": jnp.asarray(g, jnp.float32)}, old)
    age = np.array([501, 1, 3])
    mu = b1 * np.array([0.1, 0, 0.05]) + (1 - b1) * g
    nu = b2 * np.array([0.04, 0, 0.001]) + (1 - b2) * g**2
    expected = mu / (1 - b1**age) / np.sqrt(nu / (1 - b2**age)) * [1, 1 / 4, 3 / 4]
    np.testing.assert_allclose(updates["w"], expected, rtol=1e-4)
    np.testing.assert_array_equal(new.age["w"], age)
    assert new.age["w"].dtype == jnp.int16


def test_ages_are_bounded_by_their_dtype():
    for b2, dtype in ((0.999, jnp.int16), (0.99999, jnp.int32)):
        tx = rigl_optax.scale_by_adam(b2=b2)
        state = tx.init({"w": jnp.zeros(1)})
        assert state.age["w"].dtype == dtype
        most = jnp.iinfo(dtype).max
        state = state._replace(
            count=jnp.int32(most), age={"w": jnp.full(1, most, dtype)}, nu={"w": jnp.ones(1)}
        )
        updates, state = tx.update({"w": jnp.ones(1)}, state)
        assert state.age["w"][0] == most and np.isfinite(updates["w"][0])


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"b1": 1.0}, "b1=1.0: must be in"),
        ({"b2": -0.1}, "b2=-0.1: must be in"),
        ({"warmup": -1}, "warmup=-1: must be an integer from 0"),
        ({"warmup": 1.5}, "warmup=1.5: must be an integer"),
        ({"warmup": 2**15}, "warmup=32768: must be an integer"),
    ],
)
def test_what_makes_no_sense_is_refused(keys, told):
    with pytest.raises(ValueError, match=told):
        rigl_optax.scale_by_adam(**keys)


def test_newborn_weights_start_again_and_all_others_go_on_as_in_optax():
    keys = {"end": 100, "every": 5, "begin": 4, "drop_fraction": 0.5}
    ours = run(rigl_optax.rigl(rigl_optax.adamw(1e-2), 0.5, **keys), 12)
    theirs = run(rigl_optax.rigl(optax.adamw(1e-2), 0.5, **keys), 12)
    for t, ((mine, state, _), (other, _, _)) in enumerate(zip(ours, theirs, strict=True)):
        np.testing.assert_array_equal(mine["b"], other["b"])  # dense
        age = state.inner_state[0].age
        assert (age["b"] == t + 1).all()
        mask = np.asarray(state.masks["a"])
        if t < 4:
            assert (np.asarray(age["a"])[mask] == t + 1).all()
            np.testing.assert_array_equal(mine["a"], other["a"])
    # The rewirings were at counts 4 and 9.
    assert set(np.unique(np.asarray(age["a"])[mask])) <= {12, 7, 2}
    assert (np.asarray(age["a"])[mask] == 2).any() and (np.asarray(age["a"])[mask] == 12).any()
