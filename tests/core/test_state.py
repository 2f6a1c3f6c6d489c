"""The state and what keeps it honest: healing, the gate, counters, dtypes, abstract init."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import rigl_optax
from rigl_optax import SparseState, uniform

METHODS = {
    "rigl": lambda inner, **k: rigl_optax.rigl(inner, uniform(0.5), end=20, every=2, **k),
    "set": lambda inner, **k: rigl_optax.sparse_evolutionary_training(
        inner, uniform(0.5), end=20, every=2, **k
    ),
    "static": lambda inner, **k: rigl_optax.static_sparse(inner, uniform(0.5), **k),
}


def some_params(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    return {
        "kernel": jnp.asarray(rng.standard_normal((6, 8)), dtype),
        "bias": jnp.asarray(rng.standard_normal(8), dtype),
    }


def some_grads(i=0, dtype=jnp.float32):
    rng = np.random.default_rng(100 + i)
    return {
        "kernel": jnp.asarray(rng.standard_normal((6, 8)), dtype),
        "bias": jnp.asarray(rng.standard_normal(8), dtype),
    }


def started(tx):
    params = some_params()
    state = tx.init(params)
    return rigl_optax.apply_masks(params, state), state


def step(tx, params, state, i=0, grads=None):
    updates, state = tx.update(some_grads(i) if grads is None else grads, state, params)
    return optax.apply_updates(params, updates), state


def sparse(params, state):
    return not np.asarray(params["kernel"])[~np.asarray(state.masks["kernel"])].any()


# ------------------------------------------------------------------------------------ the state


def test_fields():
    assert SparseState._fields[:5] == ("count", "masks", "inner_state", "rewirings", "healed")


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("param_dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("grad_dtype", [jnp.float32, jnp.bfloat16])
def test_dtypes(name, param_dtype, grad_dtype):
    """The state's types never change, and an update has `result_type(update, param)`."""
    inner = optax.sgd(0.5, momentum=0.5)
    tx = METHODS[name](inner)
    params = some_params(param_dtype)
    state = tx.init(params)
    for i in range(3):
        grads = some_grads(i, grad_dtype)
        expected = jax.eval_shape(inner.update, grads, state.inner_state, params)[0]
        updates, new = tx.update(grads, state, params)
        for n, u in updates.items():
            assert u.dtype == jnp.result_type(expected[n].dtype, params[n].dtype)
        for x in (new.count, new.rewirings, new.healed):
            assert x.dtype == jnp.int32 and x.shape == ()
        assert all(m.dtype == bool for m in jax.tree.leaves(new.masks))
        if i:
            assert jax.tree.map(lambda x: x.dtype, new) == jax.tree.map(lambda x: x.dtype, state)
        params, state = optax.apply_updates(params, updates), new
        assert params["kernel"].dtype == param_dtype
        assert sparse(params, state)


def test_a_dense_mask_is_a_full_array_of_its_own():
    tx = METHODS["rigl"](optax.sgd(0.1))
    state = tx.init({"kernel": jnp.ones((4, 4)), "a": jnp.ones((3,)), "b": jnp.ones((3,))})
    assert state.masks["a"].shape == (3,) and bool(state.masks["a"].all())
    pointers = [m.unsafe_buffer_pointer() for m in jax.tree.leaves(state.masks)]
    assert len(set(pointers)) == 3


def test_initial_masks_are_copied():
    given = {"kernel": np.eye(6, 8, dtype=bool), "bias": np.ones(8, bool)}
    tx = METHODS["static"](optax.sgd(0.1), initial_masks=given)
    state = tx.init(some_params())
    given["kernel"][:] = True
    assert int(state.masks["kernel"].sum()) == 6
    device = {n: jnp.asarray(m) for n, m in given.items()}
    tx = METHODS["static"](optax.sgd(0.1), initial_masks=device)
    masks = tx.init(some_params()).masks
    assert masks["kernel"].unsafe_buffer_pointer() != device["kernel"].unsafe_buffer_pointer()


@pytest.mark.parametrize("donate", [False, True])
def test_buffers_can_be_donated(donate):
    tx = METHODS["rigl"](optax.adam(0.1))
    params, state = started(tx)
    update = jax.jit(
        lambda g, s, p: step(tx, p, s, grads=g), donate_argnums=(1, 2) if donate else ()
    )
    for i in range(4):
        params, state = update(some_grads(i), state, params)
        assert sparse(params, state)


def test_no_key_is_stored():
    state = METHODS["set"](optax.sgd(0.1)).init(some_params())
    for leaf in jax.tree.leaves(state):
        assert not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        np.asarray(leaf)


# -------------------------------------------------------------------------------- abstract init


@pytest.mark.parametrize("name", METHODS)
def test_init_on_shapes(name):
    tx = METHODS[name](optax.adam(0.1))
    params = some_params()
    shapes = jax.eval_shape(lambda: params)
    concrete = tx.init(params)
    inside = jax.eval_shape(tx.init, params)
    also_inside = jax.eval_shape(tx.init, shapes)
    outside = tx.init(shapes)
    describe = lambda t: [(x.shape, jnp.dtype(x.dtype)) for x in jax.tree.leaves(t)]
    for other in (inside, also_inside, outside):
        assert jax.tree.structure(other) == jax.tree.structure(concrete)
        assert describe(other) == describe(concrete)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("empty", [{}, (), None, {"a": None}], ids=str)
def test_a_tree_without_leaves(name, empty):
    tx = METHODS[name](optax.adam(0.1))
    state = tx.init(empty)
    assert isinstance(state, SparseState)
    assert jax.tree.leaves(state.masks) == []


def test_jitted_init_draws_the_same_masks():
    tx = METHODS["rigl"](optax.adam(0.1))
    a, b = tx.init(some_params()), jax.jit(tx.init)(some_params())
    jax.tree.map(np.testing.assert_array_equal, a.masks, b.masks)


# -------------------------------------------------------------------------------------- healing


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("at", [1, 2], ids=["before a gradient step", "before a rewiring"])
def test_a_dense_checkpoint_is_sparse_after_one_step(name, at):
    tx = METHODS[name](optax.adamw(0.1, weight_decay=0.1))
    params, state = started(tx)
    for i in range(at):
        params, state = step(tx, params, state, i)
    dense = jax.tree.map(lambda p: p + 3.7, params)
    params, state = step(tx, dense, state, at)
    assert sparse(params, state)
    assert np.count_nonzero(state.masks["kernel"]) == 24


@pytest.mark.parametrize("name", METHODS)
def test_forgetting_apply_masks_is_harmless(name):
    tx = METHODS[name](optax.sgd(0.1))
    params = some_params()
    state = tx.init(params)
    params, state = step(tx, params, state)
    assert sparse(params, state)


@pytest.mark.parametrize("value", [1e30, -1e30, 1e-30, 1e-42, 3.4e38])
def test_any_finite_value_is_healed(value):
    tx = METHODS["static"](optax.sgd(0.1))
    params, state = started(tx)
    params = {**params, "kernel": jnp.where(state.masks["kernel"], params["kernel"], value)}
    params, state = step(tx, params, state)
    assert sparse(params, state)


def test_healed_counts_what_an_outsider_did():
    tx = METHODS["rigl"](optax.sgd(0.1))
    params, state = started(tx)
    for i in range(4):
        params, state = step(tx, params, state, i)
    assert state.healed == 0
    inactive = np.argwhere(~np.asarray(state.masks["kernel"]))[:5]
    broken = np.array(params["kernel"])
    broken[tuple(inactive.T)] = 1.0
    params, state = step(tx, {**params, "kernel": jnp.asarray(broken)}, state)
    assert state.count == 5 and state.rewirings == 3
    assert state.healed == 5
    for i in range(4):
        params, state = step(tx, params, state, i)
    assert state.healed == 5


def test_healed_counts_only_at_rewirings():
    """Between rewirings healing is silent, so that an ordinary step stays elementwise."""
    tx = METHODS["rigl"](optax.sgd(0.1))
    params, state = started(tx)
    params, state = step(tx, params, state)
    dense = jax.tree.map(lambda p: p + 1.0, params)
    params, state = step(tx, dense, state)  # count 1: a gradient step
    assert state.healed == 0
    params, state = step(tx, params, state)
    assert state.healed == 0
    assert sparse(params, state)


def test_dense_start_is_counted_once():
    tx = METHODS["rigl"](optax.sgd(0.1))
    params = some_params()
    state = tx.init(params)
    for i in range(5):
        params, state = step(tx, params, state, i)
    assert state.healed == 24


# ----------------------------------------------------------------------------------- the gate


@pytest.mark.parametrize("name", ["rigl", "set"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["active", "inactive"])
@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_non_finite_gradients_leave_everything_in_place(name, bad, where, jit):
    tx = METHODS[name](optax.sgd(optax.linear_schedule(1.0, 0.0, 10), momentum=0.5))
    params, state = started(tx)
    for i in range(4):
        params, state = step(tx, params, state, i)
    assert state.count == 4
    mask = np.asarray(state.masks["kernel"])
    grads = some_grads(9)
    poisoned = np.array(grads["kernel"])
    poisoned[tuple(np.argwhere(mask == (where == "active"))[3])] = bad
    update = jax.jit(tx.update) if jit else tx.update
    updates, new = update({**grads, "kernel": jnp.asarray(poisoned)}, state, params)
    np.testing.assert_array_equal(new.masks["kernel"], mask)
    assert not any(np.asarray(u).any() for u in jax.tree.leaves(updates))
    np.testing.assert_array_equal(
        new.inner_state[0].trace["kernel"], state.inner_state[0].trace["kernel"]
    )
    np.testing.assert_array_equal(
        new.inner_state[0].trace["bias"], state.inner_state[0].trace["bias"]
    )
    assert new.count == 5
    assert new.inner_state[1].count == 5
    params, state = step(tx, optax.apply_updates(params, updates), new, 10)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((params, state)))


@pytest.mark.parametrize(
    "inner",
    ["optax.adafactor(0.1, min_dim_size_to_factor=4)", "optax.novograd(0.1)", "contrib.prodigy()"],
)
def test_one_nan_does_not_poison_shared_statistics(inner):
    tx = METHODS["rigl"](eval(inner, {"optax": optax, "contrib": optax.contrib}))
    params, state = started(tx)
    bad = {**some_grads(), "kernel": some_grads()["kernel"].at[2, 3].set(jnp.nan)}
    for i in range(6):
        params, state = step(tx, params, state, i, grads=bad if i == 2 else None)
        assert all(np.isfinite(x).all() for x in jax.tree.leaves((params, state))), i


def test_a_gated_rewiring_still_heals():
    tx = METHODS["rigl"](optax.sgd(0.1))
    params, state = started(tx)
    dense = jax.tree.map(lambda p: p + 1.0, params)
    grads = jax.tree.map(lambda g: g * jnp.nan, some_grads())
    params, state = step(tx, dense, state, grads={**some_grads(), "kernel": grads["kernel"]})
    assert sparse(params, state)
    lives = np.asarray(state.masks["kernel"])
    np.testing.assert_array_equal(
        np.asarray(params["kernel"])[lives], np.asarray(dense["kernel"])[lives]
    )


def test_the_gate_covers_all_leaves():
    """A NaN in one layer stops the rewiring of every layer: one batch, one decision."""
    tx = METHODS["rigl"](optax.sgd(0.1))
    params = {"a": jnp.ones((6, 6)), "b": jnp.ones((6, 6))}
    state = tx.init(params)
    rng = np.random.default_rng(0)
    grads = {n: jnp.asarray(rng.standard_normal((6, 6)), jnp.float32) for n in params}
    _, moved = tx.update(grads, state, params)
    assert (np.asarray(moved.masks["b"]) != np.asarray(state.masks["b"])).any()
    _, gated = tx.update({**grads, "a": grads["a"] * jnp.nan}, state, params)
    jax.tree.map(np.testing.assert_array_equal, gated.masks, state.masks)


def test_a_nan_at_a_gradient_step_is_the_users():
    tx = METHODS["static"](optax.sgd(0.1))
    params, state = started(tx)
    mask = np.asarray(state.masks["kernel"])
    inactive = tuple(np.argwhere(~mask)[0])
    grads = some_grads()
    params, state = step(
        tx, params, state, grads={**grads, "kernel": grads["kernel"].at[inactive].set(jnp.nan)}
    )
    assert np.isfinite(params["kernel"]).all(), "it was in an inactive weight: select, not multiply"


# ----------------------------------------------------------------------------- schedules align


@pytest.mark.parametrize("name", METHODS)
def test_inner_schedules_read_the_step_of_the_loop(name):
    seen = []

    def rate(count):
        return 1.0 / (1.0 + count)

    tx = METHODS[name](optax.inject_hyperparams(optax.sgd)(learning_rate=rate))
    params, state = started(tx)
    for i in range(6):
        before = params
        params, state = step(tx, params, state, i)
        moved = np.asarray(before["bias"]) - np.asarray(params["bias"])
        if moved.any():
            seen.append((i, float((moved / np.asarray(some_grads(i)["bias"])).mean())))
        assert state.inner_state.count == i + 1 == state.count
    for i, lr in seen:
        assert lr == pytest.approx(1 / (1 + i), rel=1e-4)
    assert len(seen) == (6 if name == "static" else 3)


# ------------------------------------------------------------------------------------ MultiSteps


def test_multisteps_outside_accumulates_the_dense_gradient():
    """Two half batches under MultiSteps are one whole batch without: masks and weights agree."""
    k = 4
    tx = METHODS["rigl"](optax.sgd(0.125, momentum=0.5))
    accumulated = optax.MultiSteps(METHODS["rigl"](optax.sgd(0.125, momentum=0.5)), k)
    params, state = started(tx)
    p2, s2 = params, accumulated.init(params)
    advance = jax.jit(lambda params, state, grads: step(tx, params, state, grads=grads))
    accumulate = jax.jit(lambda params, state, grads: step(accumulated, params, state, grads=grads))
    for i in range(6):
        parts = [some_grads(10 * i + j) for j in range(k)]
        mean = jax.tree.map(lambda *g: sum(g) / k, *parts)
        params, state = advance(params, state, mean)
        for g in parts:
            p2, s2 = accumulate(p2, s2, g)
        jax.tree.map(
            np.testing.assert_array_equal, rigl_optax.get_masks(s2), rigl_optax.get_masks(state)
        )
        np.testing.assert_allclose(p2["kernel"], params["kernel"], rtol=1e-5, atol=1e-6)
    assert s2.inner_opt_state.rewirings == 3 == state.rewirings


def test_multisteps_inside_counts_micro_batches():
    tx = METHODS["rigl"](optax.MultiSteps(optax.sgd(0.1), 3).gradient_transformation())
    params, state = started(tx)
    for i in range(8):
        params, state = step(tx, params, state, i)
        assert sparse(params, state)
    assert state.rewirings == 4


# ------------------------------------------------------------------------------------ sparsity 0


@pytest.mark.parametrize("inner", ["sgd", "adamw", "lamb"])
def test_sparsity_zero_is_a_dense_run(inner):
    inner = getattr(optax, inner)(0.1)
    dense_params = params = some_params()
    tx = rigl_optax.static_sparse(inner, 0.0)
    state, dense_state = tx.init(params), inner.init(params)
    for i in range(5):
        params, state = step(tx, params, state, i)
        updates, dense_state = inner.update(some_grads(i), dense_state, dense_params)
        dense_params = optax.apply_updates(dense_params, updates)
        jax.tree.map(np.testing.assert_array_equal, params, dense_params)


@pytest.mark.parametrize("method", ["rigl", "sparse_evolutionary_training"])
def test_sparsity_zero_through_the_dynamic_methods(method):
    tx = getattr(rigl_optax, method)(optax.sgd(0.1), 0.0, end=10, every=2)
    params = some_params()
    state = tx.init(params)
    for i in range(5):
        before = params
        params, state = step(tx, params, state, i)
        assert all(bool(m.all()) for m in jax.tree.leaves(state.masks))
        if i % 2 == 0 and i < 10:
            jax.tree.map(np.testing.assert_array_equal, params, before)
    assert state.healed == 0


# ---------------------------------------------------------------------------------------- strict


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_strict_promotion(name, dtype):
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        tx = METHODS[name](optax.sgd(0.1, momentum=0.9))
        params = some_params(dtype)
        state = tx.init(params)
        params = rigl_optax.apply_masks(params, state)
        for i in range(3):
            updates, state = jax.jit(tx.update)(some_grads(i, dtype), state, params)
            params = jax.tree.map(jnp.add, params, updates)
            assert sparse(params, state)


@pytest.mark.parametrize("name", METHODS)
def test_x64(name):
    with jax.enable_x64(True):
        tx = METHODS[name](optax.adam(0.1))
        params = some_params(jnp.float64)
        state = tx.init(params)
        assert state.count.dtype == jnp.int32
        for i in range(3):
            params, state = step(tx, params, state, i, grads=some_grads(i, jnp.float64))
            assert params["kernel"].dtype == jnp.float64
            assert state.count.dtype == state.rewirings.dtype == state.healed.dtype == jnp.int32
            assert sparse(params, state)


# -------------------------------------------------------------------------------------- finding


def test_get_masks_finds_the_state_wherever_it_sits():
    params = some_params()
    tx = METHODS["rigl"](optax.adam(0.1))
    expected = tx.init(params).masks
    factory = lambda learning_rate: METHODS["rigl"](optax.adam(learning_rate))
    for around in [
        tx,
        optax.chain(optax.clip(1.0), tx),
        optax.chain(optax.clip(1.0), optax.chain(optax.identity(), tx)),
        optax.MultiSteps(tx, 2).gradient_transformation(),
        optax.apply_if_finite(tx, 3),
        optax.inject_hyperparams(factory)(learning_rate=0.1),
        optax.named_chain(("a", optax.clip(1.0)), ("b", tx)),
    ]:
        state = around.init(params)
        jax.tree.map(np.testing.assert_array_equal, rigl_optax.get_masks(state), expected)
        applied = rigl_optax.apply_masks(params, state)
        jax.tree.map(
            lambda a, p, m: np.testing.assert_array_equal(a, np.where(m, p, 0)),
            applied,
            params,
            expected,
        )


def test_get_masks_merges_the_parts_of_a_partition():
    params = {"a": jnp.ones((6, 6)), "b": jnp.ones((6, 6)), "c": jnp.ones((6, 6))}
    tx = optax.partition(
        {
            "one": METHODS["rigl"](optax.sgd(0.1)),
            "two": rigl_optax.static_sparse(optax.sgd(0.1), uniform(0.75)),
            "plain": optax.sgd(0.1),
        },
        {"a": "one", "b": "two", "c": "plain"},
    )
    state = tx.init(params)
    applied = rigl_optax.apply_masks(params, state)
    assert [int(applied[n].sum()) for n in "abc"] == [18, 9, 36]
    masks = rigl_optax.get_masks(state)
    assert set(masks) == {"a", "b", "c"}
    assert bool(jnp.all(masks["c"]))


def test_extra_arguments_pass_through():
    got = []

    def update(updates, state, params=None, **extra):
        got.append(extra)
        return updates, state

    inner = optax.GradientTransformationExtraArgs(lambda p: optax.EmptyState(), update)
    tx = METHODS["rigl"](inner)
    params, state = started(tx)
    tx.update(some_grads(), state, params, value=1.5, anything="goes")
    assert got and got[-1] == {"value": 1.5, "anything": "goes"}
    plain = METHODS["rigl"](optax.sgd(0.1))
    plain.update(some_grads(), plain.init(params), params, value=1.5)


def test_nothing_recompiles():
    tx = METHODS["rigl"](optax.adam(0.1))
    params, state = started(tx)
    update = jax.jit(tx.update)
    for i in range(5):
        updates, state = update(some_grads(i), state, params)
        params = optax.apply_updates(params, updates)
    assert update._cache_size() == 1
