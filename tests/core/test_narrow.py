"""float16: what an inactive weight computes inside an optimizer reaches nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import rigl_optax
from rigl_optax._wrapper import _narrow

SHAPES = {"a": (4, 8), "b": (8, 4), "bias": (8,)}
# Its 1e-8 is 0 in float16, and the clip spreads a NaN over all weights.
CLIPPED = (optax.scale_by_adam(), optax.clip_by_global_norm(1.0), optax.scale(-0.1))
INNER = {
    "adam": lambda: optax.adam(1e-2),
    "clipped": lambda: optax.chain(*CLIPPED),
    "trace": lambda: optax.chain(optax.scale_by_adam(), optax.trace(0.9), optax.scale(-1e-2)),
    "rms": lambda: optax.chain(optax.scale_by_rms(), optax.clip_by_global_norm(1.0)),
    "branches": lambda: optax.apply_if_finite(optax.chain(*CLIPPED), 3),
}
PLAN = {"end": 10, "every": 2}
METHODS = {
    "rigl": lambda inner: rigl_optax.rigl(inner, 0.5, **PLAN),
    "static": lambda inner: rigl_optax.static_sparse(inner, 0.5),
    "top_kast": lambda inner: rigl_optax.top_kast(inner, 0.5, backward_sparsity=0.3, every=2),
    "deep": lambda inner: rigl_optax.deep_rewiring(inner, 0.5, learning_rate=0.1),
}
CASES = [("rigl", n) for n in INNER] + [(n, "clipped") for n in METHODS if n != "rigl"]


def values(seed):
    rng = np.random.default_rng(seed)
    drawn = {n: rng.uniform(0.5, 1, s) * rng.choice([-1, 1], s) for n, s in SHAPES.items()}
    return {n: jnp.asarray(x, jnp.float16) for n, x in drawn.items()}


def run(tx, update, steps=4):
    params, state = values(0), tx.init(values(0))
    for t in range(steps):
        updates, state = update(values(t + 1), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


@pytest.mark.parametrize(("method", "inner"), CASES)
def test_finite_where_plain_optax_is(method, inner):
    tx = METHODS[method](INNER[inner]())
    params, state = run(tx, jax.jit(tx.update))
    floats = [x for x in jax.tree.leaves((params, state)) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in floats)
    assert all(not params[n][~state.masks[n]].any() for n in SHAPES)
    assert (np.asarray(params["a"])[np.asarray(state.masks["a"])] != 0).any()
    before = jax.tree.map(lambda x: (x.dtype, x.weak_type), tx.init(values(0)))
    assert jax.tree.map(lambda x: (x.dtype, x.weak_type), state) == before


def test_the_same_outside_of_jit():
    tx = METHODS["rigl"](INNER["clipped"]())
    compiled, _ = run(tx, jax.jit(tx.update), 1)
    eager, _ = run(tx, tx.update, 1)
    for n in SHAPES:
        np.testing.assert_allclose(compiled[n], eager[n], rtol=2e-3)


def test_only_quotients_of_nothing_change():
    x, y = jnp.array([0.0, 0.0, 1.0, 3.0, jnp.nan]), jnp.array([0.0, 2.0, 0.0, 2.0, 0.0])
    inf = jnp.array([jnp.inf, 0.0, -jnp.inf, jnp.inf, jnp.inf])

    def function():
        nested = jax.lax.cond(x[0] == 0, lambda: x / y, lambda: y / x)
        return jax.jit(jnp.divide)(x, y), nested, x * inf, x * jnp.inf

    first, nested, product, by_scalar = _narrow.with_zero_quotients(function)
    np.testing.assert_array_equal(first, [0, 0, jnp.inf, 1.5, jnp.nan])
    np.testing.assert_array_equal(nested, first)
    np.testing.assert_array_equal(product, [0, 0, -jnp.inf, jnp.inf, jnp.nan])
    assert np.isnan(by_scalar[0])


def test_wider_floats_are_left_alone():
    assert _narrow.is_narrow([jnp.float16(1), jnp.float32(1)])
    assert not _narrow.is_narrow([jnp.bfloat16(1), jnp.float32(1), jnp.int32(1)])


@pytest.mark.parametrize("wrap", [lambda tx: optax.apply_if_finite(tx, 3), None])
def test_gradients_narrower_than_weights_in_a_branch(wrap):
    wrap = wrap or (lambda tx: optax.conditionally_transform(tx, lambda step: step % 2 == 0))
    params = jax.tree.map(lambda x: x.astype(jnp.float32), values(0))
    grads = jax.tree.map(lambda x: x.astype(jnp.bfloat16), values(1))
    cast = optax.stateless_with_tree_map(lambda g, p: g.astype(p.dtype))
    outside = optax.chain(cast, wrap(METHODS["rigl"](optax.sgd(0.1, momentum=0.9))))
    inside = METHODS["rigl"](wrap(optax.sgd(0.1)))
    for tx in (outside, inside):
        updates, after = jax.eval_shape(tx.update, grads, tx.init(params), params)
        assert {x.dtype for x in jax.tree.leaves(updates)} == {jnp.dtype(jnp.float32)}
        assert jax.tree.map(jnp.result_type, after) == jax.tree.map(
            jnp.result_type, tx.init(params)
        )
