"""Every optimizer and wrapper Optax ships, inside and around: what works, how the rest fails."""

import functools
import itertools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

import rigl_optax
from tests.core import catalogue
from tests.core.catalogue import AROUND, CANNOT, INSIDE, NOT_RESET, WORKS

STEPS = 8
END, EVERY = 6, 2
UNIFORM = rigl_optax.uniform(0.6)
FRACTION = rigl_optax.constant_drop_fraction(0.4)


def some_params(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), dtype)
    return {
        "dense": {"kernel": draw(8, 6), "bias": jnp.zeros((6,), dtype)},
        "conv": {"kernel": draw(3, 3, 2, 4)},
    }


def loss(params):
    total = jnp.float32(0)
    for p in jax.tree.leaves(params):
        target = 0.3 * jnp.sin(jnp.arange(p.size, dtype=jnp.float32)).reshape(p.shape)
        total += jnp.mean((p.astype(jnp.float32) - target) ** 2)
    return total


def wrap(inner, **options):
    options = {"end": END, "every": EVERY, "drop_fraction": FRACTION} | options
    return rigl_optax.rigl(inner, UNIFORM, **options)


@functools.cache
def first_masks():
    """Drawn once: they depend on nothing that is inside, and the draw takes long to compile."""
    return jax.device_get(wrap(optax.identity()).init(some_params()).masks)


def inside(entry, **options):
    return wrap(entry.make(), initial_masks=first_masks(), **options)


def extra_arguments(names, value, grads):
    known = {"value": value, "obj_fn": loss, "grad": grads, "value_fn": loss}
    known["grad_fn"] = lambda params, i: jax.grad(loss)(params)
    return {n: known[n] for n in names}


def run(tx, extra=(), grad_dtype=None, steps=STEPS):
    """Params and state before the first step and after each, on the host.

    One program for the whole run: compiling is all that these tests spend their time on.
    """

    def step(carry, _):
        params, state = carry
        value, grads = jax.value_and_grad(loss)(params)
        arguments = extra_arguments(extra, value, grads)
        if grad_dtype is not None:
            grads = jax.tree.map(lambda g: g.astype(grad_dtype), grads)
        updates, state = tx.update(grads, state, params, **arguments)
        carry = optax.apply_updates(params, updates), state
        return carry, carry

    @jax.jit
    def program(params):
        state = tx.init(params)
        start = rigl_optax.apply_masks(params, state), state
        return start, jax.lax.scan(step, start, length=steps)[1]

    start, history = jax.device_get(program(some_params()))
    return [start] + [jax.tree.map(lambda x: x[i], history) for i in range(steps)]  # noqa: B023


@functools.cache
def run_inside(entry):
    """The run of an entry; several tests look at it."""
    return run(inside(entry), entry.extra)


def active(masks):
    return [int(np.count_nonzero(m)) for m in jax.tree.leaves(masks)]


def check(history):
    first = rigl_optax.get_masks(history[0][1])
    for params, state in history:
        masks = rigl_optax.get_masks(state)
        assert active(masks) == active(first)
        for p, m in zip(jax.tree.leaves(params), jax.tree.leaves(masks), strict=True):
            assert p.dtype == np.float32
            assert np.isfinite(p).all()
            assert np.abs(p).max() < 50
            assert not p[~m].any(), "an inactive weight is alive"
    return first, masks, state


@pytest.mark.parametrize(
    "entry", [e for e in INSIDE if e.verdict != CANNOT], ids=lambda e: f"{e.name}-{e.call}"
)
def test_inside(entry):
    first, last, state = check(run_inside(entry))
    assert state.rewirings == 3
    assert state.count == STEPS
    assert state.healed == 0, "the inner optimizer woke an inactive weight"
    assert any((a != b).any() for a, b in zip(*map(jax.tree.leaves, (first, last)), strict=True))


# Plain Optax lets the state of these take the gradients' dtype at the first step, so that no
# loop can carry it when they differ from the weights'.
TAKES_GRADIENT_DTYPE = {
    "optax.adan",
    "optax.lbfgs",
    "optax.optimistic_gradient_descent",
    "contrib.galore",
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "entry",
    [e for e in catalogue.ALIASES if e.verdict != CANNOT and e.name not in TAKES_GRADIENT_DTYPE],
    ids=lambda e: f"{e.name}-{e.call}",
)
def test_inside_with_bfloat16_gradients_on_float32_params(entry):
    check(run(inside(entry), entry.extra, jnp.bfloat16))


# ------------------------------------------------------------------- is the list complete?


def test_every_public_transformation_is_listed():
    """Optax grew something? Add it to `catalogue.py`, with its verdict."""
    known = {e.name for e in INSIDE + AROUND} | set(catalogue.NOT_TRANSFORMATIONS)
    assert catalogue.public_transformations() - known == set()


def test_nothing_is_listed_that_optax_does_not_have():
    known = {e.name for e in INSIDE + AROUND} | set(catalogue.NOT_TRANSFORMATIONS)
    assert known - catalogue.public_transformations() == set()


def test_the_matrix_says_why():
    for row in catalogue.rows():
        assert set(row) == {"where", "name", "call", "verdict", "why"}
        assert row["verdict"] in (WORKS, NOT_RESET, CANNOT)
        assert bool(row["why"]) == (row["verdict"] != WORKS)


# ------------------------------------------------------------------ which state belongs to whom


def per_weight_and_other(inner):
    """Leaves of an inner state that have a weight's path and shape, and other arrays.

    A restatement of "longest key-path suffix plus equal shape": with only three parameters, whose
    paths are no suffixes of each other, a match is a match.
    """
    params = some_params()
    weights = {
        tuple(path): leaf.shape for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]
    }
    state = jax.eval_shape(inner.init, params)
    matched, other = [], []
    for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]:
        suffixes = [w for w in weights if tuple(path[-len(w) :]) == w]
        if suffixes and weights[suffixes[0]] == leaf.shape:
            matched.append(path)
        elif suffixes or leaf.ndim:
            other.append((jax.tree_util.keystr(path), leaf.shape))
    return matched, other


@pytest.mark.parametrize(
    "entry", [e for e in INSIDE if e.verdict == NOT_RESET], ids=lambda e: f"{e.name}-{e.call}"
)
def test_not_reset_per_weight_because_state_is_not_per_weight(entry):
    _, other = per_weight_and_other(entry.make())
    assert other, "all state is per weight: the verdict should be `works`"


SHARED = {  # one number for the whole network or a short window of it, not for a weight
    "optax.lbfgs",
    "contrib.mechanize",
    "contrib.reduce_on_plateau",
    "optax.noisy_sgd",
    "optax.add_noise",
    "optax.zero_nans",  # a flag per layer, written afresh at each step
    "contrib.muon",  # coefficients
    "contrib.scale_by_muon",
    "contrib.sophia",  # a key
}


@pytest.mark.parametrize(
    "entry", [e for e in INSIDE if e.verdict == WORKS], ids=lambda e: f"{e.name}-{e.call}"
)
def test_works_means_that_all_state_of_a_weight_is_reset(entry):
    _, other = per_weight_and_other(entry.make())
    if entry.name not in SHARED:
        assert not other, "some state belongs to no weight: the verdict is `not reset per weight`"


@pytest.mark.parametrize(
    "entry",
    [e for e in catalogue.ALIASES if e.verdict in (WORKS, NOT_RESET)],
    ids=lambda e: f"{e.name}-{e.call}",
)
def test_a_newly_grown_weight_has_state_at_rest(entry):
    """`inner.init`, not zero: adagrad starts at 0.1, rprop at its step size, dog at the weights."""
    inner = entry.make()
    matched, _ = per_weight_and_other(inner)
    if not matched:
        pytest.skip("no state per weight")
    flatten = lambda tree: dict(jax.tree_util.tree_flatten_with_path(tree)[0])
    moved = 0
    for (_, before), (params, after) in itertools.pairwise(run_inside(entry)):
        if after.rewirings == before.rewirings:
            continue
        rest = jax.device_get(inner.init(jax.tree.map(jnp.asarray, params)))
        old, new, rest = (flatten(t) for t in (before.inner_state, after.inner_state, rest))
        was, now = flatten(before.masks), flatten(after.masks)
        for path in matched:
            weight = next(w for w in was if tuple(path[-len(w) :]) == tuple(w))
            lives, grown = was[weight] & now[weight], now[weight] & ~was[weight]
            moved += np.count_nonzero(grown)
            for chosen, expected in ((lives, old), (grown, rest)):
                np.testing.assert_array_equal(
                    np.asarray(new[path])[chosen],
                    np.asarray(expected[path])[chosen],
                    err_msg=str(path),
                )
    assert moved


# ----------------------------------------------------------------------- what cannot work inside


@pytest.mark.parametrize("entry", [e for e in INSIDE if "acprop" in e.name], ids=lambda e: e.name)
def test_acprop_divides_by_the_moment_that_was_reset(entry):
    """Sparse it stays; but a weight that has just grown jumps by the learning rate over 1e-16."""
    assert entry.verdict == CANNOT
    worst = 0.0
    for params, state in run_inside(entry):
        for p, m in zip(jax.tree.leaves(params), jax.tree.leaves(state.masks), strict=True):
            assert not p[~m].any()
            worst = max(worst, float(np.abs(p).max()), float(~np.isfinite(p).all()))
    assert worst > 1e6


def test_line_search_stores_the_gradient_of_another_point():
    """`value_and_grad_from_state` hands a stale, masked gradient on: nothing to grow by."""
    (entry,) = [e for e in INSIDE if e.name == "optax.scale_by_zoom_linesearch"]
    assert entry.verdict == CANNOT
    inner = entry.make()
    tx = wrap(inner, begin=3, end=4)
    value_and_grad = optax.value_and_grad_from_state(loss)
    params = some_params()
    state = tx.init(params)
    params = rigl_optax.apply_masks(params, state)
    wrong = []

    @jax.jit
    def step(params, state):
        found = value, grads = value_and_grad(params, state=state)
        true = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params, value=value, grad=grads, value_fn=loss)
        return optax.apply_updates(params, updates), state, found, true

    for _ in range(6):
        params, state, (value, grads), (true_value, true_grads) = step(params, state)
        same = all(
            np.allclose(a, b, atol=1e-6)
            for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(true_grads), strict=True)
        )
        wrong.append(not (same and np.isclose(value, true_value)))
    assert any(wrong)


@pytest.mark.parametrize("name", ["optax.flatten", "optax.sm3", "contrib.galore"])
def test_no_number_of_this_state_belongs_to_a_weight(name):
    """Sparse they stay (above); but what a dropped weight left in the state, its heir inherits."""
    (entry,) = [e for e in INSIDE if e.name == name]
    assert entry.verdict == NOT_RESET
    inner = entry.make()
    _, other = per_weight_and_other(inner)
    tx = inside(entry, begin=3, end=4)
    *_, (_, before), (params, after) = run(tx, entry.extra, steps=4)
    unmatched = {p for p, _ in other}
    rest = inner.init(jax.tree.map(jnp.asarray, params))
    kept = []
    for (path, leaf), (_, old), (_, at_rest) in zip(
        *(
            jax.tree_util.tree_flatten_with_path(t)[0]
            for t in (after.inner_state, before.inner_state, rest)
        ),
        strict=True,
    ):
        if jax.tree_util.keystr(path) in unmatched and np.asarray(old).any():
            kept.append((np.asarray(leaf) != np.asarray(at_rest)).any())
    assert any(kept)


@pytest.mark.parametrize("entry", catalogue.REFUSED, ids=lambda e: f"{e.name}-{e.call}")
def test_what_is_refused_at_init(entry):
    params = some_params()
    if entry.name == "optax.lookahead":
        params = optax.LookaheadParams.init_synced(params)
    tx = wrap(entry.make())
    for init in (tx.init, jax.jit(tx.init), lambda params: jax.eval_shape(tx.init, params)):
        with pytest.raises(ValueError, match="lookahead|opaque_mode|'conv/kernel' never learn"):
            init(params)


def test_frozen_layers_may_be_dense_or_around():
    freeze = catalogue.REFUSED[2].make()
    dense = rigl_optax.uniform(0.6, dense=lambda path, leaf: "conv" in path or leaf.ndim < 2)
    wrap_dense = rigl_optax.rigl(freeze, dense, end=END, every=EVERY)
    labels = {"dense": "train", "conv": "frozen"}
    around = optax.partition(
        {"train": wrap(optax.adam(1e-2)), "frozen": optax.set_to_zero()}, labels
    )
    for tx in (wrap_dense, around):
        (start, _), *_, (params, state) = run(tx)
        np.testing.assert_array_equal(start["conv"]["kernel"], params["conv"]["kernel"])
        assert not params["dense"]["kernel"][~rigl_optax.get_masks(state)["dense"]["kernel"]].any()
    rigl_optax.static_sparse(freeze, UNIFORM).init(some_params())  # nothing is rewired


def test_dpsgd_wants_a_gradient_per_example():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        inner = contrib.dpsgd(1e-2, 1.0, 1.0, seed=0)
    tx = wrap(inner)
    params = some_params()
    state = tx.init(params)
    with pytest.raises((ValueError, TypeError)):
        tx.update(params, state, params)


# ---------------------------------------------------------------------------------- around it


def around(entry):
    sgd = optax.sgd(1e-1, momentum=0.9)
    tx = wrap(sgd)
    factory = lambda learning_rate: wrap(optax.sgd(learning_rate, momentum=0.9))
    other = wrap(optax.adam(1e-2), seed=1)
    if entry.name == "optax.partition":
        # The bias goes with the convolution, so that each part has something to sparsify.
        pass
    return entry.make(tx, factory=factory, other=other)


@pytest.mark.parametrize("entry", [e for e in AROUND if e.allowed], ids=lambda e: e.name)
def test_around(entry):
    tx = optax.with_extra_args_support(around(entry))
    changed = False
    previous = None
    for params, state in run(tx, steps=STEPS):
        masks = rigl_optax.get_masks(state)
        assert jax.tree.structure(masks) == jax.tree.structure(params)
        full = [
            np.broadcast_to(m, p.shape)
            for m, p in zip(jax.tree.leaves(masks), jax.tree.leaves(params), strict=True)
        ]
        assert [int(m.sum()) for m in full] == [int(m.sum()) for m in (previous or full)]
        if previous is not None:
            changed |= any((a != b).any() for a, b in zip(previous, full, strict=True))
        previous = full
        for p, m in zip(jax.tree.leaves(params), full, strict=True):
            assert np.isfinite(p).all()
            assert not p[~m].any()
    assert changed


@pytest.mark.parametrize(
    "entry",
    [e for e in AROUND if not e.allowed and e.name not in ("optax.lookahead", "contrib.sam")],
    ids=lambda e: e.name,
)
def test_not_around(entry):
    """Each of these leaves weights alive that the masks call inactive. Loaded weights, too."""
    tx = optax.with_extra_args_support(around(entry))
    alive = 0
    for params, state in run(tx, steps=STEPS):
        masks = rigl_optax.get_masks(state)
        for p, m in zip(jax.tree.leaves(params), jax.tree.leaves(masks), strict=True):
            alive = max(alive, int(np.count_nonzero(p[~m])))
    assert alive > 0


def test_lookahead_around_mixes_two_topologies():
    """Its slow weights are inactive-weight-for-inactive-weight those of earlier masks."""
    (entry,) = [e for e in AROUND if e.name == "optax.lookahead"]
    assert not entry.allowed
    tx = around(entry)
    params = optax.LookaheadParams.init_synced(some_params())
    state = tx.init(params)
    update, alive = jax.jit(tx.update), 0
    for i in range(STEPS):
        grads = jax.grad(loss)(params.fast)
        grads = jax.tree.map(lambda g, i=i: jnp.roll(g, 5 * i), grads)
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        masks = rigl_optax.get_masks(state)
        for tree in (params.fast, params.slow):
            for p, m in zip(jax.tree.leaves(tree), jax.tree.leaves(masks), strict=True):
                alive = max(alive, int(np.count_nonzero(np.asarray(p)[~np.asarray(m)])))
    assert alive > 0


def test_sam_around_turns_masks_into_integers():
    """It selects between two states by multiplying: a bool becomes an int32."""
    tx = contrib.sam(wrap(optax.sgd(0.1)), optax.sgd(0.1), sync_period=2)
    params = some_params()
    state = tx.init(params)
    _, state = tx.update(params, state, params)
    assert {m.dtype for m in jax.tree.leaves(rigl_optax.get_masks(state))} != {jnp.dtype(bool)}


@functools.cache
def clipped_both_ways():
    clip = optax.clip_by_global_norm(0.1)
    return (
        optax.chain(clip, wrap(optax.sgd(1.0), end=1)),
        wrap(optax.chain(clip, optax.sgd(1.0)), end=1),
    )


def test_clipping_before_sees_the_dense_gradient_and_inside_the_sparse_one():
    norms = []
    for tx in clipped_both_ways():
        params = some_params()
        state = tx.init(params)
        params = rigl_optax.apply_masks(params, state)
        zero = jax.tree.map(jnp.zeros_like, params)
        updates, state = tx.update(zero, state, params)  # the rewiring
        params = optax.apply_updates(params, updates)
        updates, _ = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
        norms.append(float(optax.tree.norm(updates)))
    assert norms[1] == pytest.approx(0.1, rel=1e-5)
    assert norms[0] < 0.09
