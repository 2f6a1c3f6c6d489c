"""Every method that rewires weights in place, over 40 steps, against its NumPy restatement."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import rigl_optax
from rigl_optax._ranking import _packing, _random
from tests.core import reference as core
from tests.methods import reference

SHAPES = {"a": (17, 12), "b": (3, 3, 4, 6), "c": (12, 5), "d": (5,)}
SPARSE = ("a", "b", "c")
PLAN = {"end": 34, "every": 5, "begin": 2}
FRACTION = 0.4
STEPS = 40


def some_tree(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return {n: (scale * rng.standard_normal(s)).astype(np.float32) for n, s in SHAPES.items()}


def growth_scores(seed, shapes=SHAPES, purpose=_random.Purpose.GROWTH):
    """What `random_scores` promises: jax.random.bits of a folded key, per leaf and count."""

    def scores(t, name):
        position = sorted(shapes).index(name)
        with jax.threefry_partitionable(True):
            key = jax.random.key(seed, impl="threefry2x32")
            for word in (int(purpose), position, t):
                key = jax.random.fold_in(key, word)
            bits = jax.random.bits(key, shapes[name], "uint32")
        return np.asarray(bits >> 1).astype(np.int64)

    return scores


def round_keys(seed):
    """The bits of the first eight entries of a leaf's key."""

    def keys(t, name):
        position = sorted(SHAPES).index(name)
        with jax.threefry_partitionable(True):
            key = jax.random.key(seed, impl="threefry2x32")
            for word in (int(_random.Purpose.CANDIDATE), position, t):
                key = jax.random.fold_in(key, word)
            return [int(x) for x in jax.random.bits(key, (8,), "uint32")]

    return keys


CONSTANT = rigl_optax.constant_drop_fraction(FRACTION)
ERK = rigl_optax.erk(0.7)
KEYS = PLAN | {"seed": 3}
CASES = {
    "set": (
        lambda inner: rigl_optax.sparse_evolutionary_training(
            inner, ERK, drop_fraction=CONSTANT, **KEYS
        ),
        lambda **k: reference.Set(scores=growth_scores(3), **k),
    ),
    "rigl, candidates": (
        lambda inner: rigl_optax.rigl(inner, ERK, candidates=0.5, drop_fraction=CONSTANT, **KEYS),
        lambda **k: reference.Gse(scores=round_keys(3), ratio=0.5, **k),
    ),
    "mest": (
        lambda inner: rigl_optax.mest(
            inner, ERK, drop_fraction=CONSTANT, gradient_weight=0.3, **KEYS
        ),
        lambda **k: reference.Mest(scores=growth_scores(3), weight=0.3, **k),
    ),
    "mest, soft": (
        lambda inner: rigl_optax.mest(
            inner, ERK, drop_fraction=CONSTANT, gradient_weight=0.3, soft=True, **KEYS
        ),
        lambda **k: reference.SoftMest(scores=growth_scores(3), weight=0.3, **k),
    ),
    "snfs": (
        lambda inner: rigl_optax.sparse_momentum(inner, ERK, drop_fraction=CONSTANT, **KEYS),
        lambda **k: reference.Snfs(**k),
    ),
    "snfs, redistributed": (
        lambda inner: rigl_optax.sparse_momentum(
            inner, ERK, drop_fraction=CONSTANT, momentum=0.5, redistribute=True, **KEYS
        ),
        lambda **k: reference.Snfs(momentum=0.5, redistribute=True, **k),
    ),
    "dsr": (
        lambda inner: rigl_optax.dynamic_sparse_reparameterization(
            inner, ERK, drop_fraction=CONSTANT, initial_threshold=0.05, **KEYS
        ),
        lambda **k: reference.Dsr(scores=growth_scores(3), threshold=0.05, **k),
    ),
    "pruning": (
        lambda inner: rigl_optax.gradual_magnitude_pruning(inner, ERK, **KEYS),
        lambda **k: reference.Pruning(**k),
    ),
    "global pruning": (
        lambda inner: rigl_optax.gradual_magnitude_pruning(inner, ERK, scope="global", **KEYS),
        lambda **k: reference.Pruning(whole=True, **k),
    ),
    "granet": (
        lambda inner: rigl_optax.granet(inner, ERK, drop_fraction=CONSTANT, **KEYS),
        lambda **k: reference.Pruning(whole=True, regrow=True, **k),
    ),
    "granet, per layer": (
        lambda inner: rigl_optax.granet(
            inner, ERK, drop_fraction=CONSTANT, scope="layer", initial_sparsity=0.0, **KEYS
        ),
        lambda **k: reference.Pruning(regrow=True, **k),
    ),
    "acdc": (
        lambda inner: rigl_optax.acdc(inner, ERK, **KEYS),
        lambda **k: reference.Acdc(**k),
    ),
    "hard thresholding": (
        lambda inner: rigl_optax.iterative_hard_thresholding(inner, ERK, **KEYS | {"every": 2}),
        lambda **k: reference.HardThresholding(**k | {"every": 2}),
    ),
}
FROM_DENSE = {name for name in CASES if "pruning" in name or "granet" in name}
FROM_DENSE |= {"acdc", "hard thresholding"}


def sgd():
    return optax.sgd(0.05, momentum=0.9)


def started(tx):
    params = some_tree(0)
    state = tx.init(params)
    return rigl_optax.apply_masks(params, state), state


@functools.cache
def run(name, devices=1):
    """Params and state after every step; on several devices the leaves that divide are sharded."""
    tx = CASES[name][0](sgd())
    params, state = started(tx)
    step = jax.jit(tx.update)
    if devices > 1:
        mesh = jax.make_mesh((devices,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))

        def place(x):
            axes = [i for i, n in enumerate(x.shape) if n % devices == 0]
            spec = [None] * x.ndim
            if axes:
                spec[axes[0]] = "x"
            sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
            return jax.device_put(x, sharding)

        params, state = jax.tree.map(place, (params, state))
    history = []
    for t in range(STEPS):
        updates, state = step(some_tree(100 + t), state, params)
        params = optax.apply_updates(params, updates)
        history.append(jax.device_get((params, state)))
    return history


@pytest.mark.parametrize("name", CASES)
def test_equals_the_restatement_over_a_trajectory(name):
    tx, restate = CASES[name]
    params, state = jax.device_get(started(tx(sgd())))
    keys = {"fraction": FRACTION, **PLAN}
    if name in FROM_DENSE:
        final = ERK({n: jax.ShapeDtypeStruct(s, jnp.float32) for n, s in SHAPES.items()})
        zeros = {n: core.zeros_in(final[n], SHAPES[n]) for n in SPARSE}
        start = {n: int((~np.asarray(state.masks[n])).sum()) for n in SPARSE}
        keys |= {"zeros": zeros, "start": start}
    ref = restate(inner=core.Momentum(0.05, 0.9), sparse=frozenset(SPARSE), **keys)
    masks = {n: np.asarray(state.masks[n]) for n in SPARSE}
    expected = ref.init(params, masks)
    weights = {n: np.asarray(p) for n, p in params.items()}
    for t, (params, state) in enumerate(run(name)):
        updates, expected = ref.update(some_tree(100 + t), expected, weights)
        weights = core.apply_updates(weights, updates)
        for n in SHAPES:
            np.testing.assert_array_equal(state.masks[n], expected.masks[n], err_msg=f"{t} {n}")
            np.testing.assert_allclose(params[n], weights[n], rtol=1e-5, atol=1e-6)
            assert not params[n][~state.masks[n]].any()
            trace = expected.slots[n]["trace"]
            np.testing.assert_allclose(state.inner_state[0].trace[n], trace, rtol=1e-5, atol=1e-6)
        assert int(state.rewirings) == expected.rewirings
        weights = {n: np.asarray(p) for n, p in params.items()}  # no drift of rounding
        expected.slots = {n: {"trace": state.inner_state[0].trace[n]} for n in SHAPES}


@pytest.mark.parametrize("name", CASES)
def test_the_total_is_kept_or_falls_to_the_target(name):
    final = ERK({n: jax.ShapeDtypeStruct(s, jnp.float32) for n, s in SHAPES.items()})
    totals = [sum(int(s.masks[n].sum()) for n in SPARSE) for _, s in run(name)]
    wanted = sum(np.prod(SHAPES[n]) - core.zeros_in(final[n], SHAPES[n]) for n in SPARSE)
    if name == "acdc":
        assert set(totals) == {wanted, sum(np.prod(SHAPES[n]) for n in SPARSE)}
    elif name == "mest, soft":
        assert totals[0] == wanted < max(totals) <= wanted * (1 + FRACTION)
    else:
        assert totals == sorted(totals, reverse=True)
    assert totals[-1] == wanted
    if name not in FROM_DENSE | {"mest, soft"}:
        assert set(totals) == {wanted}


@pytest.mark.parametrize("name", ["snfs, redistributed", "dsr"])
def test_weights_move_between_layers(name):
    first, last = run(name)[0][1], run(name)[-1][1]
    assert any(first.masks[n].sum() != last.masks[n].sum() for n in SPARSE)


@pytest.mark.parametrize("name", CASES)
def test_the_same_on_eight_devices_and_after_a_restart(name):
    one, eight = run(name), run(name, devices=8)
    for (_, a), (_, b) in zip(one, eight, strict=True):
        for n in SPARSE:
            np.testing.assert_array_equal(a.masks[n], b.masks[n])
    # From what was saved at step 20, by another jitted function.
    params, state = one[20]
    step = jax.jit(CASES[name][0](sgd()).update)
    for t in range(21, 30):
        updates, state = step(some_tree(100 + t), state, params)
        params = optax.apply_updates(params, updates)
    for a, b in zip(jax.tree.leaves(one[29]), jax.tree.leaves((params, state)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_packed_or_apart_the_same(monkeypatch):
    """With one device leaves lie side by side; the tests have eight."""
    name = "snfs, redistributed"
    apart = run(name)
    for name in ("snfs, redistributed", "global pruning", "dsr"):
        apart = run(name)
        with monkeypatch.context() as patch:
            patch.setattr(jax, "device_count", lambda *_: 1)
            assert _packing.packing([(2,), (3,)], [False] * 2).is_packed
            packed = run.__wrapped__(name)
        for (_, a), (_, b) in zip(apart, packed, strict=True):
            for n in SPARSE:
                np.testing.assert_array_equal(a.masks[n], b.masks[n])


def stacked_and_apart(make):
    """A run on a stack of three layers, and one on three leaves from the same masks."""
    shape = (17, 12)
    tree = lambda seed: np.random.default_rng(seed).standard_normal((3, *shape)).astype(np.float32)
    apart = lambda x: {str(i): x[i] for i in range(3)}
    stacked_tx = make(sgd(), rigl_optax.uniform(0.7, stacked=("layers",)), None)
    state = stacked_tx.init({"layers": tree(0)})
    apart_tx = make(sgd(), rigl_optax.uniform(0.7), apart(np.asarray(state.masks["layers"])))
    apart_state = apart_tx.init(apart(tree(0)))
    params = rigl_optax.apply_masks({"layers": tree(0)}, state)
    apart_params = rigl_optax.apply_masks(apart(tree(0)), apart_state)
    step, apart_step = jax.jit(stacked_tx.update), jax.jit(apart_tx.update)
    for t in range(20):
        updates, state = step({"layers": tree(100 + t)}, state, params)
        params = optax.apply_updates(params, updates)
        updates, apart_state = apart_step(apart(tree(100 + t)), apart_state, apart_params)
        apart_params = optax.apply_updates(apart_params, updates)
        yield np.asarray(state.masks["layers"]), apart_state.masks


@pytest.mark.parametrize(
    "name",
    ["snfs", "snfs, redistributed", "global pruning", "granet, per layer", "hard thresholding"],
)
def test_a_stack_of_layers_is_so_many_layers(name):
    keys = {**PLAN, "end": 20}
    momentum = functools.partial(rigl_optax.sparse_momentum, drop_fraction=CONSTANT, **keys)
    make = {
        "snfs": lambda inner, s, m: momentum(inner, s, initial_masks=m),
        "snfs, redistributed": lambda inner, s, m: momentum(
            inner, s, initial_masks=m, redistribute=True
        ),
        "global pruning": lambda inner, s, m: rigl_optax.gradual_magnitude_pruning(
            inner, s, scope="global", initial_masks=m, initial_sparsity=0.2, **keys
        ),
        "granet, per layer": lambda inner, s, m: rigl_optax.granet(
            inner, s, scope="layer", initial_masks=m, drop_fraction=CONSTANT, **keys
        ),
        "hard thresholding": lambda inner, s, m: rigl_optax.iterative_hard_thresholding(
            inner, s, initial_masks=m, initial_sparsity=0.2, **keys
        ),
    }[name]
    first = last = None
    for stacked, apart in stacked_and_apart(make):
        for i in range(3):
            np.testing.assert_array_equal(stacked[i], apart[str(i)])
        first, last = stacked if first is None else first, stacked
    assert not np.array_equal(first, last)
