"""Condensed training of single weights is masked unstructured training: same masks and weights."""

import dataclasses
import functools
import re

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import rigl_optax
from rigl_optax import Block, condensed
from rigl_optax._ranking import _packing, _random
from rigl_optax.condensed import _compaction, csr_topology
from rigl_optax.condensed.single import _candidates, _csr, _csr_topology
from tests.core import reference

STEPS = 300
PLAN = {"end": 200, "every": 20, "begin": 3}
SEED = 4
DROP = {"drop_fraction": rigl_optax.constant_drop_fraction(0.3)}
# Above and below the density at which gradients are computed one by one; a dense layer.
SPARSITY = rigl_optax.uniform(
    0.8, dense=lambda path, leaf: leaf.ndim < 2 or "head" in path, overrides={"b/": 0.98}
)
SHAPES = {"a": (22, 32), "b": (32, 40), "c": (40, 16), "head": (16, 4)}
METHODS = {
    "rigl": (rigl_optax.rigl, condensed.rigl),
    "set": (
        rigl_optax.sparse_evolutionary_training,
        functools.partial(condensed.sparse_evolutionary_training, seed=SEED),
    ),
    "mest": (rigl_optax.mest, functools.partial(condensed.mest, seed=SEED)),
    "candidates": (
        functools.partial(rigl_optax.rigl, candidates=1.5),
        functools.partial(condensed.rigl, candidates=1.5, seed=SEED),
    ),
}
INNER = {
    "momentum": lambda: optax.chain(
        optax.add_decayed_weights(1e-3),
        optax.sgd(optax.cosine_decay_schedule(0.05, STEPS), momentum=0.9, nesterov=True),
    ),
    "adam": lambda: optax.adam(optax.cosine_decay_schedule(5e-3, STEPS)),
}
SINGLE = rigl_optax.Unstructured()
# "c" of blocks in one tree with single weights.
MIXED = {"c/": Block(2, 4)}


def random(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


def first_params():
    params = {n: {"kernel": random(i, *s) / s[0] ** 0.5} for i, (n, s) in enumerate(SHAPES.items())}
    for name, shape in SHAPES.items():
        params[name]["bias"] = np.zeros(shape[1])
    return params


def network(params, x):
    # Units that are dead have gradients of exactly 0, among which only the index decides.
    for name in ("a", "b", "c"):
        x = jax.nn.relu(x @ params[name]["kernel"] + params[name]["bias"])
    return x @ params["head"]["kernel"] + params["head"]["bias"]


def loss(params, x, y):
    return jnp.mean((network(params, x) - y) ** 2)


def steps_of(tx, loss):
    """An ordinary and a rewiring step of a condensed transformation."""

    def ordinary(weights, state, *batch):
        _, grads = condensed.value_and_grad(loss)(weights, state.topologies, *batch)
        updates, state = tx.update(grads, state, weights)
        return optax.apply_updates(weights, updates), state

    def rewiring(weights, state, *batch):
        found = condensed.value_grad_and_scores(loss)(weights, state.topologies, *batch)
        return tx.rewire(*found[1:], state, weights)

    return ordinary, rewiring


@functools.cache
def both(optimizer, growth, structure_name):
    """Params and state of the masked run, weights and state of the condensed one, each step.

    In float64, or rounding would part them at near-ties; the inputs are those of both. Scores are
    looked at in several chunks.
    """
    structure = {"single": SINGLE, "mixed": MIXED}[structure_name]
    masked_of, condensed_of = METHODS[growth]
    with pytest.MonkeyPatch.context() as patch, jax.enable_x64(True):
        patch.setattr(_csr, "_AT_ONCE", 200)
        patch.setattr(_candidates, "_AT_ONCE", 200)
        patch.setattr(_csr_topology, "_PIECE", 8)
        params = jax.tree.map(jnp.asarray, first_params())
        tx = masked_of(INNER[optimizer](), SPARSITY, structure=structure, seed=SEED, **PLAN, **DROP)
        state = jax.jit(tx.init)(params)
        params = jax.jit(rigl_optax.apply_masks)(params, state)
        weights, topologies = condensed.condense(params, state.masks, structure)
        ctx = condensed_of(INNER[optimizer](), **PLAN, **DROP)
        cstate = ctx.init(weights, topologies)

        @jax.jit
        def step(params, state, x, y):
            updates, state = tx.update(jax.grad(loss)(params, x, y), state, params)
            return optax.apply_updates(params, updates), state

        ordinary, rewiring = map(jax.jit, steps_of(ctx, loss))
        teacher = jax.tree.map(lambda p: np.flip(p) * 1.5, first_params())
        answer = jax.jit(functools.partial(network, teacher))
        history = [jax.device_get((params, state, weights, cstate))]
        for t in range(STEPS):
            x = jnp.asarray(random(100 + t, 8, 22))
            y = answer(x)
            params, state = step(params, state, x, y)
            take = rewiring if ctx.is_rewiring_step(t) else ordinary
            weights, cstate = take(weights, cstate, x, y)
            history.append(jax.device_get((params, state, weights, cstate)))
        value = jax.jit(loss)
        return history, float(value(params, x, y)), float(value(first_params(), x, y))


# Adam with single weights alone is left out: the mixed tree has two layers of them.
CASES = [
    ("momentum", "rigl", "single"),
    ("adam", "rigl", "mixed"),
    ("adam", "set", "mixed"),
    ("momentum", "mest", "mixed"),
    ("adam", "candidates", "mixed"),
]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_equals_masked_training(case):
    history, after, before = both(*case)
    structure = SINGLE if case[2] == "single" else MIXED
    masks_of, densify = jax.jit(condensed.masks_of), jax.jit(condensed.densify)
    condense_state = jax.jit(condensed.condense_state)
    moved = dict.fromkeys("abc", 0)
    with jax.enable_x64(True):
        for t, (params, state, weights, cstate) in enumerate(history):
            if t % 20 not in (3, 4) and t < STEPS:  # before and after rewirings
                continue
            masks = masks_of(weights, cstate.topologies)
            jax.tree.map(np.testing.assert_array_equal, masks, state.masks)
            close(densify(weights, cstate.topologies), params)
            assert int(state.rewirings) == int(cstate.rewirings)
            for name in moved:
                was = history[max(t - 1, 0)][1].masks[name]["kernel"]
                moved[name] += int((was & ~state.masks[name]["kernel"]).sum())
            if t not in (24, STEPS):
                continue
            # Moments too, at rest where new; and the indices are what is made on the host.
            there = condense_state(state.inner_state, params, cstate.topologies)
            close(cstate.inner_state, there)
            _, topologies = condensed.condense(params, state.masks, structure)
            same_places(cstate.topologies, topologies)
        back = condensed.densify_state(
            cstate.inner_state, weights, cstate.topologies, INNER[case[0]]()
        )
        close(back, state.inner_state)
    assert int(cstate.rewirings) == 10 and int(cstate.count) == STEPS
    assert min(moved.values()) >= 10, moved
    assert after < 0.7 * before  # it learns


def same_places(found, wanted):
    """Whatever bound, or sample of candidates, they have."""
    is_csr = lambda t: isinstance(t, condensed.CSRTopology)
    without = lambda t: dataclasses.replace(t, sample=None) if is_csr(t) else t
    found = jax.tree.map(without, found, is_leaf=is_csr)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(a, b)


def close(found, wanted):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert a.dtype == b.dtype and a.dtype != np.float32
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)


# ------------------------------------------------------------------ one rewiring of one layer


def against(x, dy):
    """A loss whose dense gradient is `x.T @ dy`."""
    return lambda kernels: jnp.sum((x @ kernels["w"]) * dy)


@functools.cache
def rewiring_of(shape, number, method):
    """A compiled rewiring of a layer of so many weights, whose fraction is count / 8."""
    fraction = {"drop_fraction": lambda count: count / 8, "end": 9, "every": 1}
    tx = METHODS[method][1](optax.sgd(0.1, momentum=0.9), **fraction)

    @jax.jit
    def once(topology, values, gradient, count):
        state = tx.init({"w": values}, {"w": topology})._replace(count=count)
        trace = state.inner_state[0]._replace(trace={"w": jnp.arange(1.0, number + 1)})
        state = state._replace(inner_state=(trace, *state.inner_state[1:]))
        step = condensed.value_grad_and_scores(against(jnp.eye(shape[0]), gradient))
        _, *found = step({"w": values}, state.topologies)
        return tx.rewire(*found, state, {"w": values})

    return once


@pytest.mark.parametrize("method", ["rigl", "set", "mest"])
@given(data=st.data())
@settings(max_examples=30)
def test_drop_and_growth_are_those_of_the_reference(method, data):
    """Of small integers, whose many ties go to the lower row-major index."""
    shape, number = data.draw(st.sampled_from([((7, 9), 5), ((6, 5), 29)]))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    mask = rng.permutation(np.arange(np.prod(shape)) < number).reshape(shape)
    dense = rng.integers(-2, 3, shape).astype(np.float32)
    gradient = rng.integers(-2, 3, shape).astype(np.float32)
    count = data.draw(st.integers(0, 8))
    topology = csr_topology(mask)
    values = topology.extract(dense)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_candidates, "_AT_ONCE", 20)
        patch.setattr(_csr_topology, "_PIECE", 2)
        once = rewiring_of(shape, number, method)
        weights, state = once(topology, values, jnp.asarray(gradient), jnp.int32(count))
    scores = gradient if method == "rigl" else drawn(shape, count)
    kept = np.abs(dense) + np.abs(gradient) if method == "mest" else dense
    after = csr_topology(reference.rewired_mask(mask, kept, scores, np.float32(count) / 8))
    same_places(state.topologies["w"], after)
    # What stays keeps its value and its momentum; what is new has none.
    moments = np.zeros(shape)
    moments[topology.rows, topology.cols] = np.arange(1, number + 1)
    np.testing.assert_array_equal(weights["w"], after.extract(np.where(mask, dense, 0)))
    np.testing.assert_array_equal(state.inner_state[0].trace["w"], after.extract(moments))


@pytest.mark.parametrize("ratio", [0.01, 0.2, 1.0, 50.0])
def test_candidates_are_those_of_the_masked_form(ratio):
    """Too few for what is dropped, or all positions; the kernel is used several times."""
    shape = (13, 11)
    keys = {"candidates": ratio, "seed": SEED, "end": 9, "every": 1} | DROP
    params = {"bias": jnp.zeros(3), "w": jnp.asarray(random(0, *shape), jnp.float32)}
    tx = rigl_optax.rigl(optax.sgd(0.1), rigl_optax.uniform(0.8), **keys)
    state = tx.init(params)
    params = rigl_optax.apply_masks(params, state)
    weights, topologies = condensed.condense(params, state.masks, SINGLE)
    ctx = condensed.rigl(optax.sgd(0.1), **keys)
    cstate = ctx.init(weights, topologies)
    x = jnp.asarray(random(1, 3, 5, shape[0]), jnp.float32)
    sums = lambda kernels, x: sum(jnp.sum(jnp.sin(each @ kernels["w"])) for each in x)
    step = jax.jit(condensed.value_grad_and_scores(sums))
    rewire, update = jax.jit(ctx.rewire), jax.jit(tx.update)
    grown = 0
    for _ in range(4):
        old = np.asarray(state.masks["w"])
        updates, state = update(jax.grad(sums)(params, x), state, params)
        params = optax.apply_updates(params, updates)
        _, *found = step(weights, cstate.topologies, x)
        weights, cstate = rewire(*found, cstate, weights)
        mask = np.asarray(state.masks["w"])
        np.testing.assert_array_equal(cstate.topologies["w"].dense_mask(), mask)
        grown += int((mask & ~old).sum())
    assert int(cstate.rewirings) == 4
    # Nearly nothing where a single position is drawn; else three tenths of 28, four times.
    few, all_dropped = grown <= 4, grown == 4 * 8
    assert few if ratio == 0.01 else all_dropped if ratio >= 1 else not few and not all_dropped


def test_a_rewiring_among_candidates_computes_no_dense_gradient():
    topology = condensed.random_topology((512, 512), 0.98, SINGLE)
    weights = {"w": jnp.zeros(topology.values_shape)}
    products = {}
    for ratio in (1.0, None):
        tx = condensed.rigl(optax.adam(0.1), candidates=ratio, end=100)
        state = tx.init(weights, {"w": topology})
        _, rewiring = steps_of(tx, lambda k, x: once(k["w"], x))
        jaxpr = jax.make_jaxpr(rewiring)(weights, state, jnp.ones((4, 512)))
        products[ratio] = largest_product(jaxpr.jaxpr)
    assert products[None] == 512 * 512 and products[1.0] <= 4 * 512


def largest_product(jaxpr):
    """The most entries of a product of matrices."""
    most = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            most = max(most, eqn.outvars[0].aval.size)
        for inner in jax.extend.core.jaxprs_in_params(eqn.params):
            most = max(most, largest_product(inner))
    return most


def drawn(shape, count):
    """Ranks of the scores that the masked form draws for a whole layer."""
    packing = _packing.packing([shape], [False])
    (scores,) = _random.random_scores(SEED, _random.Purpose.GROWTH, [0], packing, count)
    return np.argsort(np.argsort(np.asarray(scores).reshape(-1))).reshape(shape)


@given(data=st.data())
@settings(max_examples=40)
def test_indices_of_true_entries(data):
    length, number = data.draw(st.sampled_from([(1, 1), (31, 8), (64, 64), (100, 40), (700, 5)]))
    density = data.draw(st.sampled_from([0, 0.02, 0.3, 0.97, 1]))
    mask = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1))).random(length) < density
    found = np.asarray(compacted(mask, number))
    wanted = np.flatnonzero(mask)[:number]
    np.testing.assert_array_equal(found[: wanted.size], wanted)
    assert ((found >= 0) & (found < length)).all()


compacted = jax.jit(_compaction.indices, static_argnums=1)


def test_random_weights_are_the_first_masks_of_the_masked_form(monkeypatch):
    monkeypatch.setattr(_candidates, "_AT_ONCE", 300)
    params = {"a": jnp.ones(3), "w": jnp.ones((33, 17))}
    masks = rigl_optax.static_sparse(optax.sgd(1), rigl_optax.uniform(0.9), seed=6).init(params)
    topology = condensed.random_topology((33, 17), 0.9, SINGLE, seed=6, position=1)
    wanted = csr_topology(masks.masks["w"])
    jax.tree.map(np.testing.assert_array_equal, topology, wanted)
    values = condensed.random_values(jax.random.key(0), topology)
    assert values.shape == (57,)
    assert 0.6 < float(values.std() * (topology.density * 33) ** 0.5) < 1.4


TX = condensed.rigl(optax.adam(0.1), end=100, every=10, **DROP)
rewire = jax.jit(TX.rewire)


def layer():
    topology = csr_topology(random(1, 12, 10) > 0.8)
    weights = {"w": jnp.asarray(random(0, topology.number), jnp.float32)}
    return weights, TX.init(weights, {"w": topology})


@pytest.mark.parametrize("fraction", [0.3, 1.0])
def test_no_more_is_looked_at_than_may_be_dropped(fraction):
    """And of a schedule nothing is known beforehand. What grows is the same."""
    weights, free = layer()
    x = jnp.asarray(random(1, 6, 12), jnp.float32)
    after = {}
    for name, drop in {"number": fraction, "schedule": lambda count: fraction}.items():
        tx = condensed.rigl(optax.adam(0.1), end=100, every=10, drop_fraction=drop)
        state = tx.init(weights, free.topologies)
        grads, scores = found(lambda k, x: once(k["w"], x), weights, state, x)
        most = int(fraction * weights["w"].size) + 1 if name == "number" else 200
        assert scores["w"].scores.size == min(most, weights["w"].size)
        _, after[name] = jax.jit(tx.rewire)(grads, scores, state, weights)
    same_places(after["number"].topologies, after["schedule"].topologies)
    assert int(after["number"].rewirings) == 1


def found(loss, weights, state, *batch):
    """Gradients and scores."""
    return jax.jit(condensed.value_grad_and_scores(loss))(weights, state.topologies, *batch)[1:]


def test_a_gradient_that_is_not_finite_leaves_the_topology():
    """A single one, where there is no weight."""
    weights, state = layer()
    row, col = np.argwhere(~np.asarray(state.topologies["w"].grid_mask()))[0]
    x = jnp.eye(12).at[row, row].set(1e30)
    grads, scores = found(against(x, jnp.ones((12, 10)).at[row, col].set(1e30)), weights, state)
    assert np.isfinite(grads["w"]).all() and not np.isfinite(scores["w"].scores).all()
    stays(weights, *rewire(grads, scores, state, weights), state)


def stays(weights, new, after, state):
    np.testing.assert_array_equal(new["w"], weights["w"])
    jax.tree.map(np.testing.assert_array_equal, after.topologies, state.topologies)
    assert int(after.rewirings) == 0 and int(after.count) == 1


def once(kernel, x):
    return jnp.sum(jnp.sin(x @ kernel))


USES = {
    "twice": lambda k, x: once(k["w"], x[0]) + once(k["w"], x[1]),
    "scan": lambda k, x: jax.lax.scan(lambda c, each: (c + once(k["w"], each), None), 0.0, x)[0],
    "vmap": lambda k, x: jnp.sum(jax.vmap(once, (None, 0))(k["w"], x)),
    "never": lambda k, x: jnp.float32(0),
}


@pytest.mark.parametrize("way", USES)
def test_a_kernel_that_is_not_used_once_is_not_rewired(way):
    """Nothing is known of the sum of its gradients."""
    weights, state = layer()
    x = jnp.asarray(random(1, 2, 6, 12), jnp.float32)
    stays(weights, *rewire(*found(USES[way], weights, state, x), state, weights), state)


def test_neither_is_one_by_the_mean_of_two_batches():
    weights, state = layer()
    loss = lambda k, x: once(k["w"], x)
    one, two = (
        found(loss, weights, state, jnp.asarray(random(i, 6, 12), jnp.float32)) for i in (1, 2)
    )
    mean = jax.tree.map(lambda a, b: (a + b) / 2, one, two)
    stays(weights, *rewire(*mean, state, weights), state)
    _, after = rewire(*one, state, weights)
    assert int(after.rewirings) == 1
    assert (after.topologies["w"].grid_mask() != state.topologies["w"].grid_mask()).any()


def shapes_in(compiled):
    """Numbers of entries of all arrays of a compiled program."""
    text = compiled.as_text()
    return {
        int(np.prod([int(n) for n in s.split(",")])) for s in re.findall(r"\w\[([\d,]+)\]", text)
    }


@pytest.mark.parametrize("method", METHODS)
def test_nothing_dense_in_a_step_or_a_rewiring(method):
    """The compiled programs hold no array of a dense kernel's size, in whatever shape."""
    n, batch, number = 4096, 8, 4096 * 4096 // 100
    tx = METHODS[method][1](optax.adam(1e-3), end=100)

    def start():
        topology = _csr_topology.from_places(jnp.arange(number, dtype=jnp.int32), (n, n), number)
        weights = {"w": jnp.zeros(number)}
        return weights, tx.init(weights, {"w": topology}), jnp.ones((batch, n))

    args = jax.eval_shape(start)  # nothing is run
    loss = lambda kernels, x: jnp.mean((x @ kernels["w"] - 1) ** 2)
    for step in steps_of(tx, loss):
        compiled = jax.jit(step).lower(*args).compile()
        assert max(shapes_in(compiled)) < n * n / 4
        memory = compiled.memory_analysis()
        assert memory.temp_size_in_bytes < n * n * 4 / 2
        # Values, two moments, and four indices of each weight; the last for each unit.
        stored = (7 * number + 2 * n) * 4
        assert memory.argument_size_in_bytes < 1.01 * (stored + batch * n * 4)
    # The search finds what is dense, if it is there.
    dense = jax.jit(lambda v, t: condensed.CSR(v, t).dense() * 2).lower(
        args[0]["w"], args[1].topologies["w"]
    )
    assert max(shapes_in(dense.compile())) >= n * n


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_lowers_for_accelerators(platform):
    """Lowered, not run."""
    weights, state = layer()
    _, rewiring = steps_of(TX, lambda kernels, x: jnp.sum(jnp.sin(x @ kernels["w"])))
    # Optax's states are no types that jax.export knows.
    flat = lambda weights, topology, x: jax.tree.leaves(
        rewiring(weights, state._replace(topologies={"w": topology}), x)
    )
    exported = jax.export.export(jax.jit(flat), platforms=[platform])
    text = exported(weights, state.topologies["w"], jnp.ones((3, 12))).mlir_module()
    assert "stablehlo.sort" in text and "custom_call" not in text


@pytest.mark.slow
@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
@pytest.mark.parametrize("way", ["auto", "explicit", "shard_map"])
def test_a_rewiring_with_a_batch_over_eight_devices(way):
    kind = AxisType.Explicit if way == "explicit" else AxisType.Auto
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    whole = lambda kernels, x: jnp.sum(jnp.sin(x @ kernels["w"]))
    loss = whole
    if way == "shard_map":
        loss = jax.shard_map(
            lambda kernels, x: jax.lax.psum(whole(kernels, x), "data"),
            mesh=mesh,
            in_specs=(PartitionSpec(), PartitionSpec("data")),
            out_specs=PartitionSpec(),
        )

    with jax.enable_x64(True):
        weights, state = layer()
        x = jnp.asarray(random(2, 16, 12))
        wanted = jax.device_get(jax.jit(steps_of(TX, whole)[1])(weights, state, x))
        with jax.set_mesh(mesh):
            weights, state = jax.device_put((weights, state), NamedSharding(mesh, PartitionSpec()))
            x = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
            found = jax.device_get(jax.jit(steps_of(TX, loss)[1])(weights, state, x))
    assert int(wanted[1].rewirings) == 1
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


@pytest.mark.parametrize(
    ("act", "told"),
    [
        (
            lambda w, t: condensed.rigl(optax.sgd(1), end=9, min_fan_in=1).init(w, t),
            "min_fan_in=1: 'w' is stored as single weights",
        ),
        (
            lambda w, t: condensed.rigl(optax.sgd(1), end=9).init(
                {"w": np.ones(0)}, {"w": csr_topology(np.zeros((4, 3)))}
            ),
            "'w': its topology stores nothing",
        ),
        (
            lambda w, t: condensed.rigl(optax.sgd(1), end=9).rewire(
                w, condensed.probes(t), condensed.rigl(optax.sgd(1), end=9).init(w, t), w
            ),
            "scores of 18 places, where 6 weights can be replaced: take them with the topologies",
        ),
        (
            lambda w, t: condensed.random_topology((2**16, 2**15), 0.99, SINGLE),
            r"\(65536, 32768\): single weights are ranked in layers of at most 2147483647 places",
        ),
        (
            lambda w, t: condensed.random_topology((2, 2**25), 0.99, SINGLE),
            r"16777216 inputs or outputs \(2\*\*24\)",
        ),
        (
            lambda w, t: condensed.random_topology((3, 3, 4, 4), 0.99, SINGLE),
            r"'a layer' has shape \(3, 3, 4, 4\): single weights need two axes",
        ),
        (
            lambda w, t: condensed.condense(
                {"k": np.ones((1, 2, 2))}, {"k": np.zeros((1, 2, 2), bool)}, SINGLE
            ),
            r"'k' has shape \(1, 2, 2\): single weights need two axes",
        ),
    ],
)
def test_errors(act, told):
    weights, state = layer()
    with pytest.raises(ValueError, match=told):
        act(weights, state.topologies)
