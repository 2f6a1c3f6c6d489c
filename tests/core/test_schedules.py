"""How much is dropped when: values from the paper, clipping, shift by `begin`."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

import rigl_optax


@pytest.mark.parametrize(
    ("t", "value"),
    [
        (0, 0.3),
        (100, 0.29998816),
        (1000, 0.29881721),
        (5000, 0.27135255),
        (10000, 0.19635255),
        (12500, 0.15),
        (15000, 0.10364745),
        (20000, 0.02864745),
        (25000, 0.0),
    ],
)
def test_cosine_of_the_paper(t, value):
    got = rigl_optax.cosine_drop_fraction(0.3, 25_000)(jnp.int32(t))
    assert float(got) == pytest.approx(value, rel=2e-6, abs=1e-7)


def test_cosine_near_its_end():
    got = rigl_optax.cosine_drop_fraction(0.3, 25_000)(jnp.int32(24_900))
    assert float(got) == pytest.approx(1.184e-5, abs=5e-8)


SCHEDULES = {
    "constant": (
        lambda a, end, begin: rigl_optax.constant_drop_fraction(a),
        lambda a, x: a,
    ),
    "cosine": (
        lambda a, end, begin: rigl_optax.cosine_drop_fraction(a, end, begin),
        lambda a, x: a / 2 * (1 + np.cos(np.pi * x)),
    ),
    "linear": (
        lambda a, end, begin: rigl_optax.linear_drop_fraction(a, end, begin),
        lambda a, x: a * (1 - x),
    ),
    "inverse power": (
        lambda a, end, begin: rigl_optax.inverse_power_drop_fraction(a, end, begin=begin),
        lambda a, x: a * (1 - x) ** 3,
    ),
}


@pytest.mark.parametrize("name", SCHEDULES)
@given(
    alpha=st.floats(0, 1),
    begin=st.integers(0, 1000),
    length=st.integers(1, 30_000),
    where=st.floats(0, 1),
)
def test_formulae(name, alpha, begin, length, where):
    make, formula = SCHEDULES[name]
    t = begin + int(where * length)
    got = float(make(alpha, begin + length, begin)(jnp.int32(t)))
    assert got == pytest.approx(formula(alpha, (t - begin) / length), abs=2e-6)
    assert 0 <= got <= 1


def test_the_power_is_an_argument():
    got = rigl_optax.inverse_power_drop_fraction(0.4, 10, 2.0)(jnp.int32(5))
    assert float(got) == pytest.approx(0.1)
    got = rigl_optax.inverse_power_drop_fraction(0.4, 10, power=1.0)(jnp.int32(5))
    assert float(got) == pytest.approx(0.2)


def test_power_one_is_linear():
    linear = rigl_optax.linear_drop_fraction(0.4, 100, 10)
    power = rigl_optax.inverse_power_drop_fraction(0.4, 100, 1.0, 10)
    for t in (10, 33, 99, 100):
        assert float(linear(jnp.int32(t))) == pytest.approx(float(power(jnp.int32(t))), abs=1e-7)


@pytest.mark.parametrize("name", SCHEDULES)
def test_traced_counts_and_plain_integers(name):
    schedule = SCHEDULES[name][0](0.3, 100, 10)
    for t in (10, 50, 99):
        assert float(jax.jit(schedule)(t)) == pytest.approx(float(schedule(t)), abs=1e-7)


@pytest.mark.parametrize("name", SCHEDULES)
def test_outside_the_window_it_stays_between_zero_and_alpha(name):
    schedule = SCHEDULES[name][0](0.3, 100, 10)
    for t in (0, 5, 101, 1000):
        assert -1e-9 <= float(schedule(jnp.int32(t))) <= 0.3 + 1e-6


def test_a_float_is_a_cosine_from_begin_to_end():
    """The number dropped at each rewiring is that of the cosine, shifted by `begin`."""
    begin, end, every, alpha = 4, 24, 5, 0.8
    params = {"kernel": jnp.zeros((100, 20))}

    def churn(fraction):
        tx = rigl_optax.rigl(
            optax.sgd(0.1),
            rigl_optax.uniform(0.5),
            begin=begin,
            end=end,
            every=every,
            drop_fraction=fraction,
        )
        state, p, moved = tx.init(params), params, []
        update = jax.jit(tx.update)
        for _ in range(end + 2):
            before = np.asarray(state.masks["kernel"])
            updates, state = update({"kernel": jnp.asarray(~before, jnp.float32)}, state, p)
            p = optax.apply_updates(p, updates)
            moved.append(np.count_nonzero(before & ~np.asarray(state.masks["kernel"])))
        return moved

    by_float = churn(alpha)
    assert by_float == churn(rigl_optax.cosine_drop_fraction(alpha, end, begin))
    for t in range(begin, end, every):
        fraction = alpha / 2 * (1 + np.cos(np.pi * (t - begin) / (end - begin)))
        assert abs(by_float[t] - 1000 * fraction) <= 1
    assert sum(m > 0 for m in by_float) == 4


@pytest.mark.parametrize(("fraction", "moved"), [(-1.0, 0), (0.0, 0), (1.0, 200), (7.0, 200)])
def test_a_schedule_is_clipped_to_zero_and_one(fraction, moved):
    tx = rigl_optax.rigl(
        optax.sgd(0.1), rigl_optax.uniform(0.5), end=1, drop_fraction=lambda t: fraction
    )
    params = {"kernel": jnp.zeros((20, 20))}
    state = tx.init(params)
    before = np.asarray(state.masks["kernel"])
    _, state = tx.update({"kernel": jnp.asarray(~before, jnp.float32)}, state, params)
    assert np.count_nonzero(before & ~np.asarray(state.masks["kernel"])) == moved


def test_optax_schedules_are_drop_fractions():
    tx = rigl_optax.rigl(
        optax.sgd(0.1),
        rigl_optax.uniform(0.5),
        end=10,
        every=1,
        drop_fraction=optax.linear_schedule(0.5, 0.0, 10),
    )
    params = {"kernel": jnp.zeros((20, 20))}
    state = tx.init(params)
    _, state = jax.jit(tx.update)(params, state, params)
    assert state.rewirings == 1
