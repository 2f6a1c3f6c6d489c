"""Where gradients say nothing, a layer stays as it is, and the state counts it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import rigl_optax
from rigl_optax import condensed

STACK = 3
SHAPES = {"all_zero": (4, 8), "full": (8, 8), "stack": (STACK, 8, 8)}
HALF = rigl_optax.uniform(0.5, stacked=("stack",))
PLAN = {"end": 10, "every": 2}
METHODS = {
    "rigl": lambda inner: rigl_optax.rigl(inner, HALF, **PLAN),
    "fan_in": lambda inner: rigl_optax.rigl(inner, HALF, min_fan_in=1, **PLAN),
    "parts": lambda inner: rigl_optax.rigl(
        inner, HALF, structure=rigl_optax.ConstantFanIn(0.3), **PLAN
    ),
    "redistribute": lambda inner: rigl_optax.sparse_momentum(
        inner, HALF, redistribute=True, **PLAN
    ),
    "granet": lambda inner: rigl_optax.granet(
        inner, rigl_optax.uniform(0.7, stacked=("stack",)), **PLAN
    ),
    "set": lambda inner: rigl_optax.sparse_evolutionary_training(inner, HALF, **PLAN),
    "mest": lambda inner: rigl_optax.mest(inner, HALF, **PLAN),
}


def values(seed):
    rng = np.random.default_rng(seed)
    return {n: jnp.asarray(rng.standard_normal(s), jnp.float32) for n, s in SHAPES.items()}


def layers(mask, name):
    return np.asarray(mask).reshape(STACK if name == "stack" else 1, -1)


@pytest.mark.parametrize("name", METHODS)
def test_a_layer_without_a_signal_stays_and_is_counted(name):
    tx = METHODS[name](optax.sgd(0.1, momentum=0.9))
    state = tx.init(values(0))
    params = rigl_optax.apply_masks(values(0), state)
    grads = values(1)
    grads = grads | {
        "all_zero": jnp.zeros_like(grads["all_zero"]),
        "stack": grads["stack"].at[1].set(0),
    }
    # Inside what is active a gradient is no reason to grow elsewhere: the largest weight is kept.
    largest = jnp.unravel_index(jnp.argmax(jnp.abs(params["all_zero"])), SHAPES["all_zero"])
    grads["all_zero"] = grads["all_zero"].at[largest].set(1)
    update = jax.jit(tx.update)
    _, after = update(grads, state, params)
    moved = {
        n: (layers(state.masks[n], n) != layers(after.masks[n], n)).any(1).tolist() for n in SHAPES
    }
    informed = name in ("set", "mest")
    assert moved == {"all_zero": [informed], "full": [True], "stack": [True, informed, True]}
    assert int(after.uninformed) == (0 if informed else 2)
    assert int(after.rewirings) == 1
    total = [sum(int(m.sum()) for m in jax.tree.leaves(s.masks)) for s in (state, after)]
    assert total[0] == total[1]
    if name != "redistribute":
        for n in SHAPES:
            counts = [layers(s.masks[n], n).sum(1).tolist() for s in (state, after)]
            assert counts[0] == counts[1], n
    # Gradients that are not finite are refused as a whole: that is another reason.
    grads["full"] = grads["full"].at[0, 0].set(jnp.nan)
    _, refused = update(grads, state, params)
    if name != "redistribute":  # its average leaves them out
        assert int(refused.uninformed) == int(refused.rewirings) == 0


def test_a_layer_that_is_not_due_is_not_counted():
    tx = rigl_optax.rigl(optax.sgd(0.1), HALF, overrides={"full": {"begin": 5}}, **PLAN)
    state = tx.init(values(0))
    zeros = jax.tree.map(jnp.zeros_like, values(0))
    _, after = jax.jit(tx.update)(zeros, state, rigl_optax.apply_masks(values(0), state))
    assert int(after.uninformed) == 1 + STACK
    assert jax.tree.all(jax.tree.map(np.array_equal, state.masks, after.masks))


@pytest.mark.parametrize("form", [rigl_optax.Block(2, 2), rigl_optax.Unstructured()])
def test_condensed_layers_stay_too(form):
    rng = np.random.default_rng(0)
    mask = rng.permutation(np.arange(16) < 8).reshape(4, 4)
    mask = np.kron(mask, np.ones((2, 2), bool))
    params = {"w": jnp.asarray(rng.standard_normal((8, 8)) * mask, jnp.float32)}
    weights, topologies = condensed.condense(params, {"w": jnp.asarray(mask)}, structure=form)
    tx = condensed.rigl(optax.sgd(0.1), end=10, every=2)
    state = tx.init(weights, topologies)
    step = condensed.value_grad_and_scores(lambda kernels, x: 0 * jnp.sum(x @ kernels["w"]))

    @jax.jit
    def rewire(weights, state):
        _, grads, scores = step(weights, state.topologies, jnp.eye(8))
        return tx.rewire(grads, scores, state, weights)

    moved, after = rewire(weights, state)
    assert int(after.uninformed) == int(after.rewirings) == 1
    same = jax.tree.map(np.array_equal, (weights, state.topologies), (moved, after.topologies))
    assert jax.tree.all(same)
