"""Problems that users of other sparse-training systems have reported, in the core: a test for each.

Where other modules test one of them at length, its shortest form stands here.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import rigl_optax
from rigl_optax import erk, uniform
from tests.core import reference

PARAMS = {
    "fc1": {"kernel": jnp.linspace(-1, 1, 96).reshape(8, 12), "bias": jnp.ones((12,))},
    "fc2": {"kernel": jnp.linspace(1, -1, 48).reshape(12, 4), "bias": jnp.ones((4,))},
}
GRADS = jax.tree.map(lambda p: jnp.cos(7 * p + jnp.arange(p.size).reshape(p.shape)), PARAMS)


def method(inner=None, **options):
    inner = optax.sgd(0.1, momentum=0.9) if inner is None else inner
    options = {"end": 10, "every": 2} | options
    return rigl_optax.rigl(inner, uniform(0.75), **options)


def run(tx, steps=4, params=PARAMS, grads=GRADS):
    state = tx.init(params)
    update = jax.jit(tx.update)
    for _ in range(steps):
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def density(params):
    kernels = [p for p in jax.tree.leaves(params) if p.ndim > 1]
    return sum(int((p != 0).sum()) for p in kernels) / sum(p.size for p in kernels)


def test_03_silently_dense_because_nobody_applied_the_mask():
    params, _ = run(method())  # no call of apply_masks anywhere
    assert density(params) == pytest.approx(0.25)


def test_04_silently_static_because_the_default_schedule_is_never():
    with pytest.raises(TypeError, match="end"):
        rigl_optax.rigl(optax.sgd(0.1), 0.9)
    with pytest.raises(ValueError):
        method(end=5, begin=5)
    assert run(method())[1].rewirings == 2


@pytest.mark.parametrize(
    "inner",
    [
        optax.adamw(0.1, weight_decay=0.5),
        optax.chain(optax.trace(0.9), optax.add_decayed_weights(0.5), optax.scale(-0.1)),
        optax.noisy_sgd(0.1, key=0),
    ],
    ids=["adamw", "decay", "noise"],
)
def test_05_momentum_or_weight_decay_revives_masked_weights(inner):
    params, state = run(method(inner), steps=6)
    assert density(params) <= 0.25
    assert state.healed == 96 + 48 - 36, "the dense start only"


@pytest.mark.parametrize("name", ["lion", "adafactor", "rmsprop"])
def test_06_unrecognized_optimizer_state(name):
    run(method(getattr(optax, name)(1e-2)), steps=2)  # all others: test_catalogue.py


def test_07_none_masks_break_models_with_biases():
    state = method().init(PARAMS)
    for m, p in zip(jax.tree.leaves(state.masks), jax.tree.leaves(PARAMS), strict=True):
        assert m.shape == p.shape and m.dtype == bool


def test_09_replicas_diverge_because_keys_depend_on_the_process():
    """Two processes: test_reproducible.py. Here: nothing but the seed goes into the key."""
    renamed = {k.replace("fc", "other"): v for k, v in PARAMS.items()}
    a, b = method().init(PARAMS), method().init(renamed)
    for x, y in zip(jax.tree.leaves(a.masks), jax.tree.leaves(b.masks), strict=True):
        np.testing.assert_array_equal(x, y)


def test_10_counts_drift():
    state = method(end=1000, every=1, drop_fraction=lambda t: 0.37).init(PARAMS)
    _, after = run(method(end=1000, every=1, drop_fraction=lambda t: 0.37), steps=200)
    count = lambda s: [int(m.sum()) for m in jax.tree.leaves(s.masks)]
    assert count(after) == count(state)
    assert after.rewirings == 200


def test_11_erk_asks_for_a_probability_above_one():
    shapes = {"tiny": (3, 3), "small": (10, 10), "big": (300, 300)}
    got = erk(0.9)({n: jax.ShapeDtypeStruct(s, jnp.float32) for n, s in shapes.items()})
    assert all(0 <= s < 1 for s in got.values())
    total = sum(np.prod(s) for s in shapes.values())
    zeros = sum(reference.zeros_in(got[n], s) for n, s in shapes.items())
    assert zeros / total == pytest.approx(0.9, abs=1e-4), "the density must not fall short"


def test_12_a_typo_in_a_per_layer_map_is_ignored():
    with pytest.raises(ValueError, match=r"(?s)fc3.*fc1/kernel.*fc2/kernel"):
        uniform(0.5, overrides={"fc3": 0.0})(PARAMS)


def test_13_default_filter_sparsifies_stem_depthwise_embedding():
    """Depthwise kernels and embeddings are kept by default; a stem is one override away."""
    params = {
        "stem": {"kernel": jnp.ones((3, 3, 3, 8))},
        "dw": {"kernel": jnp.ones((3, 3, 1, 8))},
        "embed": {"embedding": jnp.ones((100, 8))},
        "out": {"kernel": jnp.ones((8, 8)), "bias": jnp.ones((8,))},
    }
    assert set(uniform(0.5)(params)) == {"stem/kernel", "out/kernel"}
    assert uniform(0.5, overrides={"stem": 0.0})(params)["stem/kernel"] == 0


def test_14_a_dropped_weight_that_comes_back_keeps_value_and_state():
    mask = np.array([[1, 1, 1, 1, 0, 0, 0, 0]], bool)
    weight = jnp.asarray([[4.0, 3.0, 2.0, 1.0, 0, 0, 0, 0]])
    grad = jnp.asarray([[0, 0, 0, 9.0, 0.1, 8.0, 0.1, 0]])
    tx = rigl_optax.rigl(
        optax.trace(0.9), None, end=1, drop_fraction=lambda t: 0.5, initial_masks={"k": mask}
    )
    state = tx.init({"k": weight})
    state = state._replace(inner_state=optax.TraceState({"k": jnp.where(mask, 5.0, 0.0)}))
    updates, state = tx.update({"k": grad}, state, {"k": weight})
    new = optax.apply_updates({"k": weight}, updates)["k"]
    np.testing.assert_array_equal(new, [[4, 3, 0, 1, 0, 0, 0, 0]])
    np.testing.assert_array_equal(state.masks["k"], [[1, 1, 0, 1, 0, 1, 0, 0]])
    np.testing.assert_array_equal(state.inner_state.trace["k"], [[5, 5, 0, 5, 0, 0, 0, 0]])


def test_15_growth_from_masked_gradients_is_in_index_order():
    """Growth reads the gradient as given: it must be the dense one, and then index says nothing."""
    state = method().init(PARAMS)
    mask = np.asarray(state.masks["fc1"]["kernel"])
    wanted = np.argwhere(~mask)[-3:]  # the very last positions
    grad = np.zeros(mask.shape, np.float32)
    grad[tuple(wanted.T)] = 1.0
    grads = {**GRADS, "fc1": {**GRADS["fc1"], "kernel": jnp.asarray(grad)}}
    params = rigl_optax.apply_masks(PARAMS, state)
    _, state = method().update(grads, state, params)
    assert np.asarray(state.masks["fc1"]["kernel"])[tuple(wanted.T)].all()


def test_16_growth_is_noisy_unless_gradients_are_accumulated():
    """Under MultiSteps the rewiring reads the mean gradient of all micro-batches."""
    noise = [0.9, -0.3, -0.6]
    tx = optax.MultiSteps(method(), 3)
    params, state = PARAMS, tx.init(PARAMS)
    update = jax.jit(tx.update)
    for n in noise:
        grads = jax.tree.map(lambda g, n=n: g + n, GRADS)
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    _, expected = run(method(), steps=1)
    jax.tree.map(np.testing.assert_array_equal, rigl_optax.get_masks(state), expected.masks)


def test_17_rewiring_steps_shift_the_learning_rate_schedule():
    _, state = run(method(optax.adam(optax.linear_schedule(0.1, 0.0, 10))), steps=7)
    assert state.rewirings == 4
    assert state.inner_state[0].count == 7
    assert state.inner_state[1].count == 7


def test_18_one_nan_gradient_destroys_the_network():
    tx = method()
    params, state = run(tx, steps=2)
    before = [int(m.sum()) for m in jax.tree.leaves(state.masks)]
    updates, state = tx.update(jax.tree.map(lambda g: g * jnp.nan, GRADS), state, params)
    assert [int(m.sum()) for m in jax.tree.leaves(state.masks)] == before
    kernels = [updates["fc1"]["kernel"], updates["fc2"]["kernel"]]
    assert not any(bool(u.any()) for u in kernels)


def test_19_masks_forgotten_on_resume():
    tx = method()
    at2 = run(tx, steps=2)
    saved = jax.tree.map(np.array, at2)
    params, state = jax.tree.map(jnp.asarray, saved)
    for _ in range(2):
        updates, state = jax.jit(method().update)(GRADS, state, params)
        params = optax.apply_updates(params, updates)
    jax.tree.map(np.testing.assert_array_equal, (params, state), run(tx, steps=4))


def test_20_an_average_of_weights_stays_dense():
    """`apply_masks` makes an average of networks of several topologies sparse for evaluation."""
    tx = method(optax.sgd(1.0), end=100, every=2, drop_fraction=lambda t: 0.9)
    state = tx.init(PARAMS)
    params = rigl_optax.apply_masks(PARAMS, state)
    average = params
    update = jax.jit(tx.update)
    for i in range(6):
        grads = jax.tree.map(lambda g, i=i: jnp.roll(g, 17 * i), GRADS)
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        average = optax.incremental_update(params, average, 0.1)
    assert density(average) > 0.25
    assert density(rigl_optax.apply_masks(average, state)) <= 0.25


def test_22_a_full_sort_runs_out_of_memory():
    tx = method()
    program = str(jax.make_jaxpr(tx.update)(GRADS, tx.init(PARAMS), PARAMS))
    assert not any(f" {op}[" in program for op in ("sort", "top_k", "approx_top_k"))


def test_23_tiny_layers_collapse():
    """Units that all gradients neglect lose their inputs; with a least fan-in they keep some."""
    grads = jax.tree.map(lambda g: jnp.where(jnp.arange(g.shape[-1]) < 2, 0, g), GRADS)
    fan_ins = []
    for least in (0, 1):
        tx = method(optax.sgd(0.0), every=1, drop_fraction=lambda t: 0.9, min_fan_in=least)
        _, state = run(tx, grads=grads, steps=9)
        fan_ins.append(int(state.masks["fc1"]["kernel"].sum(0).min()))
    assert fan_ins == [0, 1]


def test_26_tuples_and_namedtuples_are_rejected():
    params, state = run(method(), params=tuple(PARAMS.values()), grads=tuple(GRADS.values()))
    assert density(params) == pytest.approx(0.25)
    assert state.rewirings == 2


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3, 1e30])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_27_an_epsilon_in_the_score_loses_connections(scale, dtype):
    """At drop fraction 0 the topology stays what it is, at any scale, in any precision."""
    cast = lambda tree: jax.tree.map(lambda x: (x * scale).astype(dtype), tree)
    tx = method(optax.sgd(0.0), drop_fraction=lambda t: 0.0)
    state = tx.init(cast(PARAMS))
    _, after = run(tx, params=cast(PARAMS), grads=cast(GRADS))
    jax.tree.map(np.testing.assert_array_equal, after.masks, state.masks)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_28_a_reset_that_multiplies_by_zero_keeps_nan(bad):
    """State of a weight that is dropped is set, not multiplied: NaN does not survive."""
    tx = method(optax.trace(0.9), begin=0, drop_fraction=lambda t: 1.0)
    state = tx.init(PARAMS)
    params = rigl_optax.apply_masks(PARAMS, state)
    state = state._replace(
        inner_state=optax.TraceState(
            jax.tree.map(lambda p: jnp.full_like(p, bad) if p.ndim > 1 else p, params)
        )
    )
    _, after = tx.update(GRADS, state, params)
    for n in ("fc1", "fc2"):
        lives = np.asarray(state.masks[n]["kernel"] & after.masks[n]["kernel"])
        trace = np.asarray(after.inner_state.trace[n]["kernel"])
        assert not trace[~lives].any()


def test_29_extra_arguments_of_update_raise():
    tx = method(optax.polyak_sgd())
    state = tx.init(PARAMS)
    tx.update(GRADS, state, PARAMS, value=jnp.float32(1.0))
    plain = method()
    plain.update(GRADS, plain.init(PARAMS), PARAMS, value=jnp.float32(1.0), grad=GRADS)


def test_30_pretrained_weights_with_a_random_mask_lose_everything():
    """Initial masks may come from the weights; they replace the random draw as they are."""
    masks = jax.tree.map(
        lambda p: np.asarray(jnp.abs(p) > 0.6) if p.ndim > 1 else np.ones(p.shape, bool), PARAMS
    )
    state = rigl_optax.static_sparse(optax.sgd(0.1), None, initial_masks=masks).init(PARAMS)
    jax.tree.map(np.testing.assert_array_equal, state.masks, masks)
