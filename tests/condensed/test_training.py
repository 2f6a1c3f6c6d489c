"""Condensed training is masked training with `structure=Block`: same masks, same weights."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import rigl_optax
from rigl_optax import Block, condensed
from rigl_optax.models import recurrence

STEPS = 300
PLAN = {"end": 200, "every": 20, "begin": 3}
SEED = 4
DROP = {"drop_fraction": rigl_optax.constant_drop_fraction(0.3)}
SPARSITY = rigl_optax.uniform(0.5, dense=lambda path, leaf: leaf.ndim < 2 or "head" in path)


def random(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


def mlp_params():
    shapes = {"a": (22, 32), "b": (32, 16), "head": (16, 4)}
    params = {n: {"kernel": random(i, *s) / s[0] ** 0.5} for i, (n, s) in enumerate(shapes.items())}
    for name, shape in shapes.items():
        params[name]["bias"] = np.zeros(shape[1])
    return params


def mlp(params, x):
    for name in ("a", "b"):
        x = jnp.tanh(x @ params[name]["kernel"] + params[name]["bias"])
    return x @ params["head"]["kernel"] + params["head"]["bias"]


def mlp_inputs(t):
    return random(100 + t, 8, 22)


MLP_BLOCKS = {"a/": Block(4, 4, pad=True), "b/": Block(2, 8, pool_by="l2")}


def conv_params():
    shapes = {"a": (3, 3, 4, 8), "b": (3, 3, 8, 6), "head": (6, 3)}
    params = {n: {"kernel": random(i, *s) / 4} for i, (n, s) in enumerate(shapes.items())}
    params["b"]["bias"] = np.zeros(6)
    return params


def convolution(x, kernel, strides):
    if isinstance(kernel, condensed.BlockSparse):
        return condensed.convolve(x, kernel, strides=strides)
    layout = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, strides, "SAME", dimension_numbers=layout)


def conv_net(params, x):
    x = jnp.tanh(convolution(x, params["a"]["kernel"], (1, 1)))
    x = jnp.tanh(convolution(x, params["b"]["kernel"], (2, 2)) + params["b"]["bias"])
    return x.mean((1, 2)) @ params["head"]["kernel"]


def conv_inputs(t):
    return random(100 + t, 4, 4, 4, 4)


CONV_BLOCKS = Block(2, 2)
CELLS = {
    "gru": (("reset", "update", "candidate"), recurrence.gru, condensed.gru),
    "lstm": (("input", "forget", "cell", "output"), recurrence.lstm, condensed.lstm),
}


def recurrent_params(cell):
    gates = CELLS[cell][0]
    params = {n: {"kernel": random(i, 16, 16) / 4} for i, n in enumerate(gates)}
    params |= {f"head_{n}": {"kernel": random(i + 4, 5, 16) / 2} for i, n in enumerate(gates)}
    return params | {"head": {"kernel": random(9, 16, 3) / 4}}


def recurrent_net(cell, params, x):
    """The state is forgotten in the middle, in every second lane."""
    names, dense, sparse = CELLS[cell]
    gates = tuple(x @ params[f"head_{n}"]["kernel"] for n in names)
    kernels = tuple(params[n]["kernel"] for n in names)
    scan = sparse if isinstance(kernels[0], condensed.BlockSparse) else dense
    keep = jnp.ones((*x.shape[:2], 1), x.dtype).at[2, ::2].set(0)
    states, last = scan(
        gates, jnp.ones((x.shape[1], 16 * (len(names) - 2)), x.dtype) / 2, kernels, keep
    )
    return (states[1:] + last[:, :16]) @ params["head"]["kernel"]


def recurrent_inputs(t):
    return random(100 + t, 5, 4, 5)


MODELS = {
    **{
        cell: (
            functools.partial(recurrent_net, cell),
            functools.partial(recurrent_params, cell),
            recurrent_inputs,
            Block(4, 2),
        )
        for cell in CELLS
    },
    "mlp": (mlp, mlp_params, mlp_inputs, MLP_BLOCKS),
    "conv": (conv_net, conv_params, conv_inputs, CONV_BLOCKS),
}
INNER = {
    "momentum": lambda: optax.chain(
        optax.add_decayed_weights(1e-3),
        optax.sgd(optax.cosine_decay_schedule(0.05, STEPS), momentum=0.9, nesterov=True),
    ),
    "adam": lambda: optax.adam(optax.cosine_decay_schedule(5e-3, STEPS)),
}


def loss_of(model, params, x, y):
    return jnp.mean((model(params, x) - y) ** 2)


def targets(model, params, x):
    """Of another network of the same kind."""
    teacher = jax.tree.map(lambda p: np.flip(p) * 1.5, params)
    return model(teacher, x)


@functools.cache
def both(name, optimizer, growth="rigl"):
    """Params and masks of the masked run, weights and state of the condensed one, each step.

    In float64, or rounding would part them at near-ties; the inputs are those of both.
    """
    model, make, inputs, blocks = MODELS[name]
    masked_of = {"rigl": rigl_optax.rigl, "set": rigl_optax.sparse_evolutionary_training}[growth]
    condensed_of = {
        "rigl": condensed.rigl,
        "set": functools.partial(condensed.sparse_evolutionary_training, seed=SEED),
    }[growth]
    with jax.enable_x64(True):
        params = jax.tree.map(jnp.asarray, make())
        answer = jax.jit(functools.partial(targets, model, make()))
        tx = masked_of(INNER[optimizer](), SPARSITY, structure=blocks, seed=SEED, **PLAN, **DROP)
        state = tx.init(params)
        params = rigl_optax.apply_masks(params, state)
        masks = rigl_optax.get_masks(state)
        weights, topologies = condensed.condense(params, masks, blocks)
        ctx = condensed_of(INNER[optimizer](), **PLAN, **DROP)
        cstate = ctx.init(weights, topologies)
        loss = functools.partial(loss_of, model)

        @jax.jit
        def step(params, state, x, y):
            updates, state = tx.update(jax.grad(loss)(params, x, y), state, params)
            return optax.apply_updates(params, updates), state

        @jax.jit
        def ordinary(weights, state, x, y):
            _, grads = condensed.value_and_grad(loss)(weights, state.topologies, x, y)
            updates, state = ctx.update(grads, state, weights)
            return optax.apply_updates(weights, updates), state

        @jax.jit
        def rewiring(weights, state, x, y):
            found = condensed.value_grad_and_scores(loss)(weights, state.topologies, x, y)
            return ctx.rewire(*found[1:], state, weights)

        value = jax.jit(loss)
        history = [jax.device_get((params, state, weights, cstate))]
        for t in range(STEPS):
            x = jnp.asarray(inputs(t))
            y = answer(x)
            params, state = step(params, state, x, y)
            take = rewiring if ctx.is_rewiring_step(t) else ordinary
            weights, cstate = take(weights, cstate, x, y)
            history.append(jax.device_get((params, state, weights, cstate)))
        return history, float(value(params, x, y)), float(value(make(), x, y))


CASES = [
    ("mlp", "momentum", "rigl"),
    ("mlp", "adam", "rigl"),
    ("conv", "momentum", "rigl"),
    ("conv", "adam", "rigl"),
    ("gru", "momentum", "rigl"),
    ("gru", "adam", "rigl"),
    ("lstm", "adam", "rigl"),
    ("mlp", "adam", "set"),
]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_equals_masked_training(case):
    history, loss, before = both(*case)
    masks_of, densify = jax.jit(condensed.masks_of), jax.jit(condensed.densify)
    changes = 0
    with jax.enable_x64(True):
        for t, (params, state, weights, cstate) in enumerate(history):
            if t % 20 not in (3, 4) and t < STEPS:  # before and after rewirings
                continue
            masks = masks_of(weights, cstate.topologies)
            dense = densify(weights, cstate.topologies)
            for path, mask in jax.tree_util.tree_leaves_with_path(state.masks):
                where = f"{t} {path}"
                np.testing.assert_array_equal(
                    mask, optax.tree.get(masks, path[0].key)[path[1].key], err_msg=where
                )
            for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(dense), strict=True):
                assert a.dtype == np.float64
                np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)
            assert int(state.rewirings) == int(cstate.rewirings)
            changes += any(
                (a != b).any()
                for a, b in zip(
                    jax.tree.leaves(state.masks), jax.tree.leaves(history[0][1].masks), strict=True
                )
            )
    assert int(cstate.rewirings) == 10 and int(cstate.count) == STEPS
    assert changes > 10
    assert loss < 0.7 * before  # it learns


def test_state_goes_both_ways():
    """The optimizer's state too is that of the masked form, and can be converted."""
    history, _, _ = both("mlp", "adam")
    params, state, weights, cstate = history[150]
    with jax.enable_x64(True):
        there = condensed.condense_state(state.inner_state, params, cstate.topologies)
        assert jax.tree.structure(there) == jax.tree.structure(cstate.inner_state)
        for a, b in zip(jax.tree.leaves(there), jax.tree.leaves(cstate.inner_state), strict=True):
            assert a.shape == b.shape
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)
        back = condensed.densify_state(
            cstate.inner_state, weights, cstate.topologies, INNER["adam"]()
        )
        for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(state.inner_state), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)
        again, topologies = condensed.condense(params, state.masks, MLP_BLOCKS)
        for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(weights), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)
        for path, topology in topologies.items():
            np.testing.assert_array_equal(topology.rows, cstate.topologies[path].rows)
            np.testing.assert_array_equal(topology.cols, cstate.topologies[path].cols)


# ------------------------------------------------------------------ one step, looked at closely


def small():
    block = Block(2, 2)
    topologies = {"w": condensed.random_topology((8, 6), 0.5, block, seed=1)}
    values = jnp.asarray(random(0, *topologies["w"].values_shape), jnp.float32)
    return {"w": values, "b": jnp.zeros(6)}, topologies


def test_moments_and_values_move_with_their_blocks():
    weights, topologies = small()
    tx = condensed.rigl(optax.adam(0.1), end=100, every=10, **DROP)
    state = tx.init(weights, topologies)
    ones = jax.tree.map(jnp.ones_like, weights)
    marked = jnp.arange(6.0)[:, None, None] + jnp.ones((1, 2, 2))
    adam = state.inner_state[0]._replace(mu={"w": marked, "b": jnp.ones(6)})
    state = state._replace(inner_state=(adam, *state.inner_state[1:]))
    scores = {"w": jnp.asarray(np.abs(random(3, 4, 3)), jnp.float32)}
    new, after = tx.rewire(ones, scores, state, weights)
    old_at = {tuple(map(int, rc)): k for k, rc in enumerate(zip(*places(topologies), strict=True))}
    kept = 0
    for k, rc in enumerate(zip(*places(after.topologies), strict=True)):
        rc = tuple(map(int, rc))
        moment = after.inner_state[0].mu["w"][k]
        if rc in old_at:
            np.testing.assert_array_equal(new["w"][k], weights["w"][old_at[rc]])
            np.testing.assert_array_equal(moment, marked[old_at[rc]])
            kept += 1
        else:
            assert not new["w"][k].any() and not moment.any()
    assert kept < 6  # int(6 * .3) = 1 is dropped
    np.testing.assert_array_equal(after.inner_state[0].mu["b"], 1)  # dense: no gradient step
    np.testing.assert_array_equal(new["b"], weights["b"])
    assert int(after.inner_state[0].count) == 1 and int(after.count) == 1


def places(topologies):
    return topologies["w"].rows, topologies["w"].cols


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_scores_that_are_not_finite_leave_the_topology(bad):
    weights, topologies = small()
    tx = condensed.rigl(optax.adam(0.1), end=100, every=10, **DROP)
    state = tx.init(weights, topologies)
    grads = jax.tree.map(lambda x: jnp.full_like(x, bad), weights)
    new, after = jax.jit(tx.rewire)(grads, {"w": jnp.full((4, 3), bad)}, state, weights)
    for a, b in zip(jax.tree.leaves(new), jax.tree.leaves(weights), strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(places(after.topologies), places(topologies))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(after.inner_state))
    assert int(after.rewirings) == 0 and int(after.count) == 1


def test_a_missed_rewiring_is_said():
    topologies = {"w": condensed.random_topology((8, 8), 0.5, Block(2, 2))}
    weights = {"w": jnp.ones((8, 2, 2))}
    tx = condensed.rigl(optax.sgd(0.1), end=7, every=2, begin=1)
    state = tx.init(weights, topologies)
    take = jax.jit(tx.update)
    for _ in range(3):  # nothing can be said under jit
        _, state = take(weights, state, weights)
    with pytest.raises(RuntimeError, match="0 of the 1 rewirings due before count 3 .* rewire"):
        tx.check(state)
    with pytest.warns(UserWarning, match="update at count 3: call rewire"):
        _, state = tx.update(weights, state, weights)
    _, state = tx.update(weights, tx.update(weights, state, weights)[1], weights)  # once
    tx.check(state._replace(rewirings=jnp.int32(3)))
    full = state._replace(count=jnp.int32(2**31 - 1))
    assert int(take(weights, full, weights)[1].count) == 2**31 - 1
    static = condensed.static_sparse(optax.sgd(0.1))
    static.check(static.init(weights, topologies))


@pytest.mark.parametrize("make", [condensed.rigl, condensed.sparse_evolutionary_training])
def test_a_bad_optimizer_is_refused_at_construction(make):
    with pytest.raises(TypeError, match="inner=.*must be an Optax transformation"):
        make(optax.sgd, end=10)
    with pytest.raises(TypeError, match="inner=0.1: must be an Optax transformation"):
        condensed.static_sparse(0.1)


@pytest.mark.parametrize("seed", [-1, 2**32, 0.5])
def test_a_bad_seed_is_refused_at_construction(seed):
    with pytest.raises((TypeError, ValueError), match=f"seed={seed}: must be"):
        condensed.sparse_evolutionary_training(optax.sgd(0.1), end=10, seed=seed)


def test_nothing_dense_in_a_step_or_a_rewiring():
    """The compiled programs hold no array of a dense kernel's size, in whatever shape."""
    n, block = 512, Block(16, 16)
    topologies = {"w": condensed.random_topology((n, n), 0.95, block)}
    weights = {"w": jnp.zeros(topologies["w"].values_shape)}
    tx = condensed.rigl(optax.adam(1e-3), end=100)
    state = tx.init(weights, topologies)
    loss = lambda kernels, x: jnp.mean((x @ kernels["w"] - 1) ** 2)

    def ordinary(weights, state, x):
        _, grads = condensed.value_and_grad(loss)(weights, state.topologies, x)
        updates, state = tx.update(grads, state, weights)
        return optax.apply_updates(weights, updates), state

    def rewiring(weights, state, x):
        found = condensed.value_grad_and_scores(loss)(weights, state.topologies, x)
        return tx.rewire(*found[1:], state, weights)

    x = jnp.ones((8, n))
    for step in (ordinary, rewiring):
        compiled = jax.jit(step).lower(weights, state, x).compile()
        memory = compiled.memory_analysis()
        assert memory.temp_size_in_bytes < n * n * 4 / 2
        stored = 3 * weights["w"].nbytes
        assert memory.argument_size_in_bytes < 1.25 * stored + x.nbytes


@pytest.mark.parametrize(
    "act, message",
    [
        (lambda w, t: condensed.rigl(optax.sgd(1), end=9).init(w, {}), "topologies is empty"),
        (
            lambda w, t: condensed.rigl(optax.sgd(1), end=9).init({"b": w["b"]}, t),
            r"no leaf 'w' in the weights; leaves are 'b'",
        ),
        (
            lambda w, t: condensed.bind({"w": jnp.ones((8, 6)), "b": w["b"]}, t),
            r"'w' has shape \(8, 6\), its topology is for values of \(6, 2, 2\)",
        ),
        (lambda w, t: condensed.rigl(optax.sgd(1), end=0), "end=0"),
        (
            lambda w, t: condensed.rigl(optax.sgd(1), end=9, overrides={"q": {}}).init(w, t),
            "'q' matches no sparse leaf",
        ),
        (
            lambda w, t: condensed.rigl(optax.sgd(1), end=9, min_fan_in=3).init(w, t),
            "min_fan_in=3: 'w' has 6 active",
        ),
        (
            lambda w, t: condensed.condense({"w": w["b"]}, {"v": w["b"]}, Block(2, 2)),
            "masks do not fit params",
        ),
        (
            lambda w, t: condensed.condense(
                {"w": np.ones((4, 4))}, {"w": np.eye(4, dtype=bool)}, Block(2, 2)
            ),
            r"'w': blocks are active in part",
        ),
        (
            lambda w, t: condensed.condense(
                {"w": np.ones((4, 4))}, {"w": np.eye(4, dtype=bool)}, rigl_optax.NM(1, 4)
            ),
            r"'w' has NM\(n=1, m=4\), for which there is no training",
        ),
    ],
)  # fmt: skip
def test_errors(act, message):
    weights, topologies = small()
    with pytest.raises(ValueError, match=message):
        act(weights, topologies)
