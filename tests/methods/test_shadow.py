"""Methods whose weights live on while inactive: every step of 40 against NumPy, and promises."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import rigl_optax
from rigl_optax import NM
from rigl_optax._ranking import _random
from rigl_optax.data import batches, digits
from tests.core.reference import top_k_mask

SHAPES = {"a": (17, 12), "b": (3, 3, 4, 6), "bias": (5,)}
SPARSE = ("a", "b")
ERK = rigl_optax.erk(0.7)
RATE, MOMENTUM = 0.05, 0.9
STEPS = 40


def some_tree(seed):
    rng = np.random.default_rng(seed)
    return {n: rng.standard_normal(s).astype(np.float32) for n, s in SHAPES.items()}


def sgd():
    return optax.sgd(RATE, momentum=MOMENTUM)


CASES = {
    "dnw": functools.partial(rigl_optax.dnw, seed=3),
    "dnw, decaying": functools.partial(rigl_optax.dnw, decay=0.2, seed=3),
    "dnw, sometimes": functools.partial(rigl_optax.dnw, every=4, end=30, seed=3),
    "top_kast": functools.partial(
        rigl_optax.top_kast, backward_sparsity=0.4, every=3, exploration=0.01, seed=3
    ),
    "str": lambda inner, s: rigl_optax.soft_thresholding(
        inner, rigl_optax.uniform(0.0), threshold_decay=0.3, initial_threshold=-3.0
    ),
    "deepr": functools.partial(
        rigl_optax.deep_rewiring, learning_rate=RATE, l1=0.02, temperature=1e-3, seed=3
    ),
}
FIXED = [name for name in CASES if name != "str"]


def start(tx, params):
    state = jax.jit(tx.init)(params)
    return rigl_optax.apply_masks(params, state), state


@functools.cache
def run(name, devices=1):
    """Params and state at first and after every step."""
    tx = CASES[name](sgd(), ERK)
    params, state = start(tx, some_tree(0))
    if devices > 1:
        mesh = jax.make_mesh((devices,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))

        def place(x):
            axes = [i for i, n in enumerate(x.shape) if n % 2 == 0][:1]
            spec = ["x" if i in axes else None for i in range(x.ndim)]
            spec = jax.sharding.PartitionSpec(*spec)
            return jax.device_put(x, jax.sharding.NamedSharding(mesh, spec))

        params, state = jax.tree.map(place, (params, state))
    update = jax.jit(tx.update, donate_argnums=1)
    history = [jax.device_get((params, state))]
    for t in range(STEPS):
        updates, state = update(some_tree(100 + t), state, params)
        params = optax.apply_updates(params, updates)
        history.append(jax.device_get((params, state)))
    return history


def draws(purpose, name, t, shape=None):
    """What `random_scores` promises: jax.random.bits of a folded key, per leaf and count."""
    with jax.threefry_partitionable(True):
        key = jax.random.key(3, impl="threefry2x32")
        position = sorted(SHAPES).index(name) if name in SHAPES else 0
        for word in (int(purpose), position, t):
            key = jax.random.fold_in(key, word)
        bits = jax.random.bits(key, shape or SHAPES[name], "uint32")
        return np.asarray(bits >> 1).astype(np.int64)


def sigmoid(x):
    return 1 / (1 + np.exp(-np.float64(x)))


def trace_of(state):
    return state.inner_state[0].trace


def largest(scores, k):
    return top_k_mask(np.abs(scores).view(np.int32), k)


def momentum_step(state, gradient, name):
    trace = gradient + np.float32(MOMENTUM) * trace_of(state)[name]
    return trace, np.float32(-RATE) * trace


def close(a, b):
    np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)


# ------------------------------------------------------------------------- step by step


@pytest.mark.parametrize("name", ["dnw", "dnw, decaying", "dnw, sometimes", "top_kast"])
def test_of_the_largest_shadow_weights(name):
    history = run(name)
    for t, ((_, old), (params, new)) in enumerate(itertools.pairwise(history)):
        grads = some_tree(100 + t)
        renews = {"dnw, sometimes": t % 4 == 0 and t < 30, "top_kast": t % 3 == 0}
        for n in SPARSE:
            shadow, mask, gradient = old.shadow[n], old.masks[n], grads[n]
            if name == "top_kast":
                mark = old.memory.second_masks[n]
                penalty = 0.01 * shadow / np.where(mask, 1, mask.mean())
                gradient = np.where(mark, gradient + penalty, 0).astype(np.float32)
            if name == "dnw, decaying":
                gradient = gradient + np.where(mask, 0, np.float32(0.2) * shadow)
            trace, step = momentum_step(old, gradient, n)
            close(trace_of(new)[n], trace)
            close(new.shadow[n], shadow + step)
            expected = mask
            if renews.get(name, True):
                expected = largest(new.shadow[n], mask.sum())
                if name == "top_kast":
                    np.testing.assert_array_equal(
                        new.memory.second_masks[n], largest(new.shadow[n], mark.sum())
                    )
            np.testing.assert_array_equal(new.masks[n], expected)
            close(params[n], np.where(expected, new.shadow[n], 0))
        trace, step = momentum_step(old, grads["bias"], "bias")
        close(trace_of(new)["bias"], trace)


def test_top_kast_learns_in_a_larger_set():
    for _, state in run("top_kast"):
        for n in SPARSE:
            assert not (state.masks[n] & ~state.memory.second_masks[n]).any()
    wide = rigl_optax.erk(0.4)({n: jnp.zeros(SHAPES[n]) for n in SPARSE})
    marks = run("top_kast")[0][1].memory.second_masks
    for n in SPARSE:
        size = np.prod(SHAPES[n])
        assert marks[n].sum() == size - int(np.floor(wide[n] * size))


def test_soft_thresholds():
    history = run("str")
    for t, ((_, old), (params, new)) in enumerate(itertools.pairwise(history)):
        thresholds, inner = old.memory.numbers
        for i, n in enumerate(SPARSE):
            gradient = np.where(old.masks[n], some_tree(100 + t)[n], 0)
            _, step = momentum_step(old, gradient, n)
            close(new.shadow[n], old.shadow[n] + step)
            sigma = sigmoid(thresholds[i])
            slope = -sigma * (1 - sigma) * (np.sign(old.shadow[n]) * gradient).sum()
            trace = slope + 0.3 * thresholds[i] + MOMENTUM * inner[0].trace[i]
            value = thresholds[i] - RATE * trace
            np.testing.assert_allclose(new.memory.numbers[0][i], value, rtol=1e-4, atol=1e-5)
            cut = np.float32(sigmoid(new.memory.numbers[0][i]))
            mask = np.abs(new.shadow[n]) > cut
            assert (mask != new.masks[n]).sum() <= (
                np.abs(np.abs(new.shadow[n]) - cut) < 1e-6
            ).sum()
            shown = np.sign(new.shadow[n]) * np.maximum(np.abs(new.shadow[n]) - cut, 0)
            close(params[n], shown)
    sparsity = [1 - s.masks["a"].mean() for _, s in history]
    assert sparsity[0] == 0 and sparsity[-1] > 0.1


def test_deep_rewiring():
    history = run("deepr")
    crossed = 0
    for t, ((_, old), (params, new)) in enumerate(itertools.pairwise(history)):
        for n in SPARSE:
            mask, sign = (
                old.masks[n],
                np.where(old.memory.second_masks[n], 1, -1).astype(np.float32),
            )
            np.testing.assert_array_equal(new.memory.second_masks[n], old.memory.second_masks[n])
            gradient = np.where(mask, some_tree(100 + t)[n], 0)
            trace, step = momentum_step(old, gradient, n)
            uniform = ((draws(_random.Purpose.NOISE, n, t) >> 8) + 0.5) / 2**22 - 1
            noise = np.sqrt(2) * np.asarray(jax.scipy.special.erfinv(np.float32(uniform)))
            size = sign * (old.shadow[n] + step) - RATE * 0.02 + np.sqrt(2 * RATE * 1e-3) * noise
            close(new.shadow[n], np.where(mask, sign * np.maximum(size, 0), 0))
            stays = mask & (new.shadow[n] != 0)
            crossed += mask.sum() - stays.sum()
            free = np.flatnonzero(~stays.reshape(-1))
            scores = draws(_random.Purpose.GROWTH, n, t).reshape(-1)[free]
            grown = free[np.argsort(-scores, kind="stable")][: mask.sum() - stays.sum()]
            expected = stays.reshape(-1).copy()
            expected[grown] = True
            np.testing.assert_array_equal(new.masks[n].reshape(-1), expected)
            kept = mask & new.masks[n]
            close(trace_of(new)[n], np.where(kept, trace, 0))
            close(params[n], np.where(new.masks[n], new.shadow[n], 0))
            assert (params[n] * sign >= 0).all()
    assert crossed > 50


def test_deep_rewiring_of_two_in_four():
    """What crosses zero grows again among the same four inputs of the unit."""
    shape, steps = (16, 6), 30
    tx = rigl_optax.deep_rewiring(
        sgd(), rigl_optax.uniform(0.5), learning_rate=RATE, l1=0.2, structure=NM(2, 4), seed=3
    )
    tree = lambda seed: {"w": np.random.default_rng(seed).standard_normal(shape, np.float32)}
    in_fours = lambda x: np.moveaxis(x, -1, 0).reshape(6, 4, 4)
    params, state = start(tx, tree(0))
    np.testing.assert_array_equal(state.memory.second_masks["w"], tree(0)["w"] > 0)
    update, crossed = jax.jit(tx.update), 0
    for t in range(steps):
        old = jax.device_get(state)
        updates, state = update(tree(100 + t), state, params)
        params = optax.apply_updates(params, updates)
        mask, sign = old.masks["w"], np.where(old.memory.second_masks["w"], 1, -1)
        trace = np.where(mask, tree(100 + t)["w"], 0) + np.float32(MOMENTUM) * trace_of(old)["w"]
        size = sign * (old.shadow["w"] - RATE * trace) - RATE * 0.2
        close(state.shadow["w"], np.where(mask, sign * np.maximum(size, 0), 0))
        stays = in_fours(mask & (np.asarray(state.shadow["w"]) != 0))
        scores = np.where(stays, -1, draws(_random.Purpose.GROWTH, "w", t, stays.shape))
        order = np.argsort(-scores, axis=-1, kind="stable")
        rank = np.argsort(order, axis=-1, kind="stable")
        expected = stays | (rank < 2 - stays.sum(-1, keepdims=True))
        np.testing.assert_array_equal(in_fours(np.asarray(state.masks["w"])), expected)
        assert (expected.sum(-1) == 2).all()
        crossed += 48 - stays.sum()
        np.testing.assert_array_equal(
            np.asarray(params["w"]) != 0, np.asarray(state.shadow["w"]) != 0
        )
    assert crossed > 30


# ---------------------------------------------------------------------------- promises


@pytest.mark.parametrize("name", CASES)
def test_what_is_not_active_is_zero_and_counts_stay(name):
    counts = []
    for params, state in run(name):
        for n in SPARSE:
            assert not params[n][~state.masks[n]].any()
        counts.append([int(state.masks[n].sum()) for n in SPARSE])
        assert state.masks["bias"].all()
    if name in FIXED:
        assert all(c == counts[0] for c in counts)
    assert any((run(name)[0][1].masks[n] != run(name)[-1][1].masks[n]).any() for n in SPARSE)
    assert int(run(name)[-1][1].healed) == 0


@pytest.mark.parametrize("name", CASES)
def test_the_same_after_a_restart(name):
    params, state = run(name)[20]
    update = jax.jit(CASES[name](sgd(), ERK).update)
    for t in range(20, 26):
        updates, state = update(some_tree(100 + t), state, params)
        params = optax.apply_updates(params, updates)
    for a, b in zip(jax.tree.leaves(run(name)[26]), jax.tree.leaves((params, state)), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", FIXED)
def test_the_same_masks_on_two_devices(name):
    for (_, a), (_, b) in zip(run(name), run(name, devices=2), strict=True):
        for n in SPARSE:
            np.testing.assert_array_equal(a.masks[n], b.masks[n])


@pytest.mark.parametrize("name", CASES)
def test_gradients_that_are_not_finite_change_nothing_but_counters(name):
    params, state = run(name)[24]  # all of them renew at count 24
    grads = jax.tree.map(lambda g: g * np.float32(np.nan), some_tree(0))
    updates, after = jax.jit(CASES[name](sgd(), ERK).update)(grads, state, params)
    applied = optax.apply_updates(params, updates)
    for n in SHAPES:
        close(applied[n], params[n])
        np.testing.assert_array_equal(trace_of(after)[n], trace_of(state)[n])
    for a, b in zip(
        jax.tree.leaves((state.masks, state.memory, state.shadow)),
        jax.tree.leaves((after.masks, after.memory, after.shadow)),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)
    assert int(after.count) == int(state.count) + 1
    assert int(after.rewirings) == int(state.rewirings)


@pytest.mark.parametrize("name", CASES)
def test_a_stack_of_layers_half_precision_adam_and_shapes_alone(name):
    distribution = rigl_optax.uniform(0.0 if name == "str" else 0.6, stacked=("layers",))
    if name == "str":
        tx = rigl_optax.soft_thresholding(optax.adam(0.05), distribution, threshold_decay=0.3)
    else:
        tx = CASES[name](optax.adam(0.05), distribution)
    leaf = np.random.default_rng(0).standard_normal((3, 10, 8))
    params = {"layers": jnp.asarray(leaf, jnp.bfloat16)}
    abstract = jax.eval_shape(tx.init, params)
    of_shapes = tx.init(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params))
    assert jax.tree.map(jnp.shape, abstract) == jax.tree.map(jnp.shape, of_shapes)
    params, state = start(tx, params)
    update = jax.jit(tx.update)
    for t in range(8):
        grads = {"layers": jnp.asarray(np.random.default_rng(t).standard_normal((3, 10, 8)))}
        updates, state = update(jax.tree.map(jnp.bfloat16, grads), state, params)
        params = optax.apply_updates(params, updates)
        mask = np.asarray(state.masks["layers"])
        assert params["layers"].dtype == jnp.bfloat16
        assert not np.asarray(params["layers"], np.float32)[~mask].any()
        if name != "str":
            assert mask.sum((1, 2)).tolist() == [32] * 3
    assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, abstract)


def test_an_ensemble_is_so_many_runs():
    make = lambda seed: rigl_optax.deep_rewiring(
        sgd(), ERK, learning_rate=RATE, temperature=1e-3, seed=seed
    )

    def masks_after(seed):
        tx = make(seed)
        params = some_tree(0)
        state = tx.init(params)
        params = rigl_optax.apply_masks(params, state)
        for t in range(4):
            updates, state = tx.update(some_tree(100 + t), state, params)
            params = optax.apply_updates(params, updates)
        return state.masks

    seeds = jnp.arange(3, dtype=jnp.int32)
    together = jax.jit(jax.vmap(masks_after))(seeds)
    one = jax.jit(masks_after)
    for i in range(3):
        apart = one(seeds[i])
        for n in SPARSE:
            np.testing.assert_array_equal(together[n][i], apart[n])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: rigl_optax.top_kast(sgd(), 0.5, backward_sparsity=0.6), "at most sparsity"),
        (lambda: rigl_optax.top_kast(sgd(), None, backward_sparsity=0.6), "sparsity=None"),
        (
            lambda: rigl_optax.top_kast(sgd(), 0.5, backward_sparsity=0.1, exploration=-1.0),
            "exploration=-1.0",
        ),
        (lambda: rigl_optax.soft_thresholding(sgd(), threshold_decay=-1.0), "threshold_decay=-1"),
        (lambda: rigl_optax.deep_rewiring(sgd(), 0.5, learning_rate=0.1, l1=-1), "l1=-1"),
        (lambda: rigl_optax.dnw(sgd(), 0.5, every=0), "every=0"),
        (lambda: rigl_optax.dnw(sgd(), 0.5, decay=-1), "decay=-1"),
        (lambda: rigl_optax.rigl(sgd(), 0.5, end=9, candidates=0), "candidates=0"),
        (
            lambda: rigl_optax.rigl(sgd(), 0.5, end=9, candidates=1, min_fan_in=2),
            "min_fan_in=2: a unit may have no candidate",
        ),
        (lambda: rigl_optax.dnw(sgd(), 1.0), "sparsity"),
    ],
)
def test_bad_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("name", ["dnw", "top_kast", "deepr", "str"])
def test_learns_digits(name):
    data = digits.load("")
    images = batches.to_float(jnp.asarray(data.train.images[:600]), maximum=data.maximum)
    images, labels = images.reshape(600, -1), jnp.asarray(data.train.labels[:600])
    rng = np.random.default_rng(0)
    sizes = [(images.shape[1], 100), (100, 10)]
    params = {
        f"w{i}": jnp.asarray(rng.standard_normal(s) / s[0] ** 0.5, jnp.float32)
        for i, s in enumerate(sizes)
    }

    def loss(params):
        logits = jax.nn.relu(images @ params["w0"]) @ params["w1"]
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))

    inner = optax.sgd(0.3, momentum=0.9)
    tx = {
        "dnw": lambda: rigl_optax.dnw(inner, 0.9),
        "top_kast": lambda: rigl_optax.top_kast(inner, 0.9, backward_sparsity=0.7, every=10),
        "deepr": lambda: rigl_optax.deep_rewiring(inner, 0.9, learning_rate=0.3, temperature=1e-8),
        "str": lambda: rigl_optax.soft_thresholding(inner, threshold_decay=2e-3),
    }[name]()
    params, state = start(tx, params)
    first = float(loss(params))

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(150):
        params, state = step(params, state)
    assert float(loss(params)) < 0.3 * first
