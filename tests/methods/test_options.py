"""What the methods that drop and grow can be told besides: exact, on hand-made steps."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import rigl_optax
from rigl_optax import Grown
from rigl_optax._ranking import _apportion, _packing
from tests.core.reference import rewired_mask
from tests.methods.reference import apportion, mean_magnitude

SHAPES = {"a": (17, 12), "b": (3, 3, 4, 6)}
CONSTANT = rigl_optax.constant_drop_fraction(0.4)
UNIFORM = rigl_optax.uniform(0.6)


def some_tree(seed):
    rng = np.random.default_rng(seed)
    return {n: rng.standard_normal(s).astype(np.float32) for n, s in SHAPES.items()}


def run(tx, steps, grads=some_tree):
    """Params and state before the first step and after each."""
    params = some_tree(1000)
    state = jax.jit(tx.init)(params)
    params = rigl_optax.apply_masks(params, state)
    update = jax.jit(tx.update)
    history = [jax.device_get((params, state))]
    for t in range(steps):
        updates, state = update(grads(t), state, params)
        params = optax.apply_updates(params, updates)
        history.append(jax.device_get((params, state)))
        for n in SHAPES:
            assert not np.asarray(params[n])[~np.asarray(state.masks[n])].any()
    return history


def rigl(inner=None, **keys):
    keys = {"end": 20, "every": 5, "drop_fraction": CONSTANT} | keys
    return rigl_optax.rigl(inner or optax.sgd(0.1, momentum=0.9), UNIFORM, **keys)


# ---------------------------------------------------------------------------- accumulation


def test_growth_goes_by_the_sum_of_the_last_gradients():
    history = run(rigl(accumulate=3), 11)
    for t in (0, 5, 10):
        (params, before), (_, after) = history[t : t + 2]
        window = range(max(t - 2, 0), t + 1)
        for n in SHAPES:
            total = np.zeros(SHAPES[n], np.float32)
            for s in window:
                total = total + some_tree(s)[n]
            np.testing.assert_array_equal(
                after.masks[n], rewired_mask(before.masks[n], params[n], total, 0.4)
            )


def test_a_gradient_in_the_window_that_is_not_finite_leaves_the_topology():
    def grads(t):
        return jax.tree.map(lambda g: g * np.float32(np.nan if t == 4 else 1), some_tree(t))

    masks = [s.masks for _, s in run(rigl(optax.zero_nans(), accumulate=3), 11, grads)]
    assert all(np.array_equal(masks[5][n], masks[6][n]) for n in SHAPES)
    assert not all(np.array_equal(masks[10][n], masks[11][n]) for n in SHAPES)


@pytest.mark.parametrize("number", [0, 6, 2.0, True])
def test_accumulation_over_more_than_an_interval_is_refused(number):
    with pytest.raises(ValueError, match=r"accumulate=.*\[1, every=5\]"):
        rigl(accumulate=number)


def test_overrides_and_accumulation_do_not_go_together():
    with pytest.raises(ValueError, match="without overrides"):
        rigl(accumulate=2, overrides={"a": {"every": 3}})


# ------------------------------------------------------------------------------ overrides


def test_layers_with_a_plan_of_their_own():
    overrides = {"b": {"every": 3, "drop_fraction": rigl_optax.constant_drop_fraction(0.2)}}
    history = run(rigl(overrides=overrides), 12)
    for t in range(12):
        (params, before), (_, after) = history[t : t + 2]
        is_due = {"a": t % 5 == 0, "b": t % 3 == 0}
        fraction = {"a": 0.4, "b": 0.2}
        for n in SHAPES:
            expected = before.masks[n]
            if is_due[n]:
                expected = rewired_mask(expected, params[n], some_tree(t)[n], fraction[n])
            np.testing.assert_array_equal(after.masks[n], expected)
        assert after.rewirings - before.rewirings == any(is_due.values())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"nowhere": {"every": 3}}, "'nowhere' matches no sparse leaf.*'a', 'b'"),
        ({"a": {"every": 3}, "[ab]": {"end": 7}}, "'a' is matched by"),
        ({"a": {"evry": 3}}, "unknown 'evry'; may have 'begin'"),
        ({"a": {"end": 0}}, "end=0"),
        ({"(": {"end": 9}}, "not a regular expression"),
    ],
)
def test_bad_overrides_are_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        rigl(overrides=overrides).init(some_tree(0))


# -------------------------------------------------------------- a gradient step as well


def test_with_a_gradient_step_what_stays_moves_on_rewiring_steps_too():
    (params, before), (after_params, after) = run(rigl(gradient_step=True), 1)
    for n in SHAPES:
        grad = some_tree(0)[n]
        mask = rewired_mask(before.masks[n], params[n], grad, 0.4)
        np.testing.assert_array_equal(after.masks[n], mask)
        stays = before.masks[n] & mask
        expected = np.where(stays, params[n] - np.float32(0.1) * grad, 0)
        np.testing.assert_allclose(after_params[n], expected, rtol=1e-6, atol=1e-7)
        trace = after.inner_state[0].trace[n]
        np.testing.assert_array_equal(trace, np.where(stays, grad, 0))


def test_with_a_gradient_step_a_gradient_that_is_not_finite_is_not_taken():
    def grads(t):
        return jax.tree.map(lambda g: g * np.float32(np.inf), some_tree(t))

    (params, before), (after_params, after) = run(rigl(gradient_step=True), 1, grads)
    for a, b in zip(
        jax.tree.leaves((params, before.masks, before.inner_state)),
        jax.tree.leaves((after_params, after.masks, after.inner_state)),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


# ------------------------------------------------------------------------------ minimum fan-in


@pytest.mark.parametrize("leaf", ["a", "b"])
def test_units_keep_and_regain_their_least_inputs(leaf):
    history = run(rigl(min_fan_in=3, end=40), 40)
    fan_ins = [s.masks[leaf].reshape(-1, SHAPES[leaf][-1]).sum(0) for _, s in history]
    for before, after in itertools.pairwise(fan_ins):
        assert (after >= np.minimum(before, 3)).all()
        assert before.sum() == after.sum()
    assert (fan_ins[-1] >= 3).all()


def test_a_unit_that_all_gradients_neglect_survives_with_it_alone():
    def grads(t):
        tree = some_tree(t)
        tree["a"][:, 0] = 0
        return tree

    def fan_in(**keys):
        drop = rigl_optax.constant_drop_fraction(0.9)
        _, state = run(rigl(optax.sgd(0.0), every=1, drop_fraction=drop, **keys), 19, grads)[-1]
        return int(state.masks["a"][:, 0].sum())

    assert fan_in() == 0
    assert fan_in(min_fan_in=2) == 2


def test_stacked_layers_have_units_of_their_own():
    params = {"layers": np.random.default_rng(0).standard_normal((3, 10, 8)).astype(np.float32)}
    distribution = rigl_optax.uniform(0.5, stacked=("layers",))
    tx = rigl_optax.rigl(
        optax.sgd(0.0), distribution, end=30, every=1, drop_fraction=CONSTANT, min_fan_in=2
    )
    state = tx.init(params)
    update = jax.jit(tx.update)
    for t in range(10):
        grads = {"layers": np.random.default_rng(t).standard_normal((3, 10, 8)).astype(np.float32)}
        grads["layers"][1, :, 3] = 0
        _, state = update(grads, state, params)
    assert (np.asarray(state.masks["layers"]).sum(1) >= 2).all()
    assert (np.asarray(state.masks["layers"]).sum((1, 2)) == 40).all()


@pytest.mark.parametrize(
    ("number", "message"),
    [(18, "'a' have 17 inputs"), (7, "82 active weights for 12 units; at most 6"), (-1, "least 0")],
)
def test_a_fan_in_that_cannot_be_is_refused(number, message):
    with pytest.raises(ValueError, match=message):
        rigl(min_fan_in=number).init(some_tree(0))


# ------------------------------------------------------------------- what new weights start from


def newborn(history):
    (params, before), (after_params, after) = history[0], history[1]
    new = {n: after.masks[n] & ~before.masks[n] for n in SHAPES}
    assert all(m.any() for m in new.values())
    for n in SHAPES:
        stays = before.masks[n] & after.masks[n]
        np.testing.assert_array_equal(after_params[n][stays], params[n][stays])
    return new, after_params


@pytest.mark.parametrize("divisor", [1.0, 4.0])
@pytest.mark.parametrize("value", ["gradient", "gradient_sign"])
def test_new_weights_start_along_the_gradient(value, divisor):
    new, params = newborn(run(rigl(grown=Grown(value, divisor)), 1))
    for n in SHAPES:
        grad = some_tree(0)[n]
        expected = (np.sign(grad) if value == "gradient_sign" else grad) / np.float32(divisor)
        # The update is a difference to the weight that is there, 0.
        np.testing.assert_array_equal(params[n][new[n]], expected[new[n]])


@pytest.mark.parametrize("value", ["normal", "uniform"])
def test_new_weights_start_at_random(value):
    new, params = newborn(run(rigl(grown=Grown(value, 2.0)), 1))
    values = np.concatenate([params[n][new[n]] for n in SHAPES])
    assert len(np.unique(values)) == len(values)
    assert abs(values.mean()) < 0.2
    assert abs(values.std() - (0.5 if value == "normal" else 0.5 / 3**0.5)) < 0.12
    assert np.abs(values).max() < (2.5 if value == "normal" else 0.5)


def test_new_weights_start_from_a_permutation_of_the_initial_ones():
    new, params = newborn(run(rigl(grown=Grown("initial", 2.0)), 1))
    initial = some_tree(1000)
    for n in SHAPES:
        values = params[n][new[n]]
        assert np.isin(values, initial[n] / 2).all()
        assert len(np.unique(values)) == len(values)


@pytest.mark.parametrize(
    ("grown", "message"),
    [
        (Grown("ones"), "grown.value='ones'.*zeros, normal"),
        (Grown(optimizer_state="warm"), "grown.optimizer_state='warm'"),
        (Grown(divisor=0.0), "grown.divisor=0.0"),
    ],
)
def test_bad_starts_are_refused(grown, message):
    with pytest.raises(ValueError, match=message):
        rigl(grown=grown)


def test_optimizer_state_of_new_weights_can_start_at_the_gradient():
    history = run(rigl(grown=Grown(gradient_scale=0.5)), 1)
    new, _ = newborn(history)
    trace = history[1][1].inner_state[0].trace
    for n in SHAPES:
        np.testing.assert_array_equal(trace[n][new[n]], np.float32(0.5) * some_tree(0)[n][new[n]])
        gone = ~history[1][1].masks[n]
        assert not trace[n][gone].any()


def test_second_moments_of_new_weights_can_start_at_their_layers_mean():
    adam = functools.partial(rigl, optax.adam(1e-3))
    grown = Grown(optimizer_state="mean_second_moment")
    plain, warm = (run(adam(begin=5, **k), 6) for k in ({}, {"grown": grown}))
    (_, before), (_, after) = warm[5:7]
    for n in SHAPES:
        old, new = before.masks[n], after.masks[n]
        np.testing.assert_array_equal(new, plain[6][1].masks[n])
        nu, was = after.inner_state[0].nu[n], before.inner_state[0].nu[n]
        np.testing.assert_allclose(nu[new & ~old], was[old & new].mean(), rtol=1e-5)
        np.testing.assert_array_equal(nu[old & new], was[old & new])
        assert not after.inner_state[0].mu[n][new & ~old].any()
        assert not nu[~new].any()


# ---------------------------------------------------------------------------- sharing out


def test_sharing_out_adds_up_and_keeps_to_the_room():
    split = jax.jit(_apportion.apportion)
    rng = np.random.default_rng(0)
    for _ in range(60):
        room = rng.integers(0, 50, 6).astype(np.int32)
        shares = (rng.random(6) * rng.integers(0, 2, 6)).astype(np.float32)
        total = int(rng.integers(0, 260))
        parts = np.asarray(split(jnp.int32(total), shares, room))
        assert parts.sum() == min(total, room.sum())
        assert (parts >= 0).all() and (parts <= room).all()
        np.testing.assert_array_equal(parts, apportion(total, shares, room.tolist()))
    # The last layer closed, and a division that is a product with a reciprocal: it once hung.
    room, shares = np.array([224123, 22986, 293], np.int32), np.array([4.2, 3.2, 8.2], np.float32)
    parts = np.asarray(split(jnp.int32(7823), shares, room))
    np.testing.assert_array_equal(parts, apportion(7823, shares, room.tolist()))
    room = np.array([2**30, 2**30 - 6, 5], np.int32)
    parts = np.asarray(split(jnp.int32(2**31 - 1), shares, room))
    np.testing.assert_array_equal(parts, room)


def test_means_are_near_those_of_floats_and_the_same_packed(monkeypatch):
    rng = np.random.default_rng(0)
    values = [
        rng.standard_normal(s).astype(np.float32) * 10.0**i for i, s in enumerate([(9, 700), (33,)])
    ]
    masks = [rng.random(v.shape) < 0.3 for v in values]
    values.append(np.zeros((4, 4), np.float32))
    masks.append(np.zeros((4, 4), bool))
    each = []
    for devices in (8, 1):
        monkeypatch.setattr(jax, "device_count", lambda *_, n=devices: n)
        packing = _packing.packing([v.shape for v in values], [False] * 3)
        packed = (
            packing.pack([jnp.asarray(v) for v in values], 0.0),
            packing.pack([jnp.asarray(m) for m in masks], False),
        )
        each.append(np.asarray(_apportion.mean_magnitudes(*packed, packing.ranking_ids)))
    np.testing.assert_array_equal(*each)
    for mean, v, m in zip(each[0], values, masks, strict=True):
        assert mean == mean_magnitude(v, m)
        exact = np.abs(v[m]).mean() if m.any() else 0
        assert abs(mean - exact) <= 2**-15 * max(np.abs(v).max(), 1e-30)
