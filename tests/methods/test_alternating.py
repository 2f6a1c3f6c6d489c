"""AC/DC: where phases lie, what the optimizer keeps at a change, and the dense model."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import rigl_optax

SHAPES = {"kernel": (12, 10), "bias": (10,)}


def some_tree(seed):
    rng = np.random.default_rng(seed)
    return {n: rng.standard_normal(s).astype(np.float32) for n, s in SHAPES.items()}


def history(tx, steps):
    """Params and state before and after each step."""
    params = some_tree(0)
    state = tx.init(params)
    update = jax.jit(tx.update)
    for t in range(steps):
        before = jax.device_get((params, state))
        updates, state = update(some_tree(100 + t), state, params)
        params = optax.apply_updates(params, updates)
        yield before, jax.device_get((params, state))


@pytest.mark.parametrize(
    ("end", "changes"), [(4, [3]), (6, [3]), (8, [3]), (9, [3, 6, 9]), (13, [3, 6, 9])]
)
def test_it_ends_sparse_whatever_the_end(end, changes):
    tx = rigl_optax.acdc(optax.sgd(0.1), 0.8, begin=3, every=3, end=end + 1)
    design = tx.design
    assert list(design.plan.default.schedule.steps()) == changes
    dense = [design.method.progress(t) for t in range(15)]
    expected = [sum(c <= t for c in changes) % 2 for t in range(15)]
    assert dense == expected and dense[-1] == 1


@pytest.mark.parametrize("gradient_step", [False, True])
def test_all_optimizer_states_start_anew_in_a_dense_phase(gradient_step):
    inner = optax.adam(0.1)
    tx = rigl_optax.acdc(inner, 0.8, end=7, every=2, gradient_step=gradient_step)
    for t, ((old_params, old), (params, state)) in enumerate(history(tx, 6)):
        moments, before = state.inner_state[0], old.inner_state[0]
        mask = state.masks["kernel"]
        assert moments.count == t + 1
        assert mask.all() == (t in (2, 3))
        if t == 2:
            assert all(not moments.mu[n].any() and not moments.nu[n].any() for n in SHAPES)
            assert not params["kernel"][~old.masks["kernel"]].any()
        elif t == 4 and not gradient_step:
            expected = np.where(mask, before.mu["kernel"], 0)
            np.testing.assert_array_equal(moments.mu["kernel"], expected)
        if t in (0, 2, 4) and not gradient_step:
            expected = np.where(mask, old_params["kernel"], 0)
            np.testing.assert_array_equal(params["kernel"], expected)


def test_the_dense_model_is_that_of_the_last_dense_phase():
    tx = rigl_optax.acdc(optax.sgd(0.1), 0.8, end=5, every=2, keep_dense=True)
    wrapped = optax.chain(optax.clip(1e6), tx)
    params, state = some_tree(0), wrapped.init(some_tree(0))
    jax.tree.map(np.testing.assert_array_equal, rigl_optax.dense_model(state), params)
    steps = list(history(tx, 8))
    for t, ((before, _), (_, state)) in enumerate(steps):
        kept = rigl_optax.dense_model(state)
        if t < 4:
            jax.tree.map(np.testing.assert_array_equal, kept, some_tree(0))
        elif t == 4:
            last = before
            assert np.count_nonzero(last["kernel"]) == 120
        if t >= 4:
            jax.tree.map(np.testing.assert_array_equal, kept, last)


def test_a_dense_model_that_is_not_kept():
    state = rigl_optax.acdc(optax.sgd(0.1), 0.8, end=5).init(some_tree(0))
    with pytest.raises(ValueError, match="0 of 1 sparse states keep a dense model"):
        rigl_optax.dense_model(state)
    with pytest.raises(ValueError, match="0 of 0"):
        rigl_optax.dense_model(optax.EmptyState())


def test_a_change_that_fails_resets_nothing():
    tx = rigl_optax.acdc(optax.sgd(0.1, momentum=0.9), 0.8, end=7, every=2)
    *_, (params, state) = (after for _, after in history(tx, 2))
    assert not state.masks["kernel"].all()
    grads = jax.tree.map(lambda x: x * jnp.float32(np.nan), some_tree(5))
    updates, after = jax.jit(tx.update)(grads, state, params)
    assert not any(np.asarray(u).any() for u in jax.tree.leaves(updates))
    same = lambda a, b: np.testing.assert_array_equal(a, b)
    jax.tree.map(same, after.inner_state[0].trace, state.inner_state[0].trace)
    jax.tree.map(same, after.masks, state.masks)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scope": "all"}, "scope='all'"),
        ({"sparsity": None}, "sparsity=None"),
        ({"begin": 9}, "begin=9"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        rigl_optax.acdc(optax.sgd(0.1), **{"sparsity": 0.5, "end": 9} | arguments)
