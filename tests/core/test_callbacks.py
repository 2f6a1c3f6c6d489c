"""What an inner optimizer calls on the host is called once in each update."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import io_callback

import rigl_optax

METHODS = {
    "rigl": lambda inner: rigl_optax.rigl(inner, 0.5, end=10, every=2),
    "dnw": lambda inner: rigl_optax.dnw(inner, 0.5, every=2),
}


def on_host(kind, called):
    """A transformation that hands updates through the host, by one of JAX's ways."""

    def note(x):
        called.append(kind)
        return np.asarray(x)

    def through(x):
        shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
        if kind == "debug":
            jax.debug.callback(lambda: called.append(kind))
            return x
        if kind == "io":
            return io_callback(note, shape, x, ordered=True)
        return jax.jit(lambda y: jax.pure_callback(note, shape, y))(x)

    return optax.stateless(lambda updates, params: jax.tree.map(through, updates))


@pytest.mark.parametrize("kind", ["debug", "io", "pure"])
@pytest.mark.parametrize("method", METHODS)
def test_once(method, kind):
    called = []
    # Behind it the result of the call is used, before it the state that is stored.
    inner = optax.chain(optax.trace(0.9), on_host(kind, called), optax.sgd(0.1, momentum=0.9))
    plain = optax.chain(optax.trace(0.9), optax.sgd(0.1, momentum=0.9))
    params = {"kernel": jnp.asarray(np.random.default_rng(0).standard_normal((4, 8)), jnp.float32)}
    results = []
    for each in (inner, plain):
        tx = METHODS[method](each)
        state, update, weights = tx.init(params), jax.jit(tx.update), params
        for _ in range(3):
            called.clear()
            updates, state = update(params, state, weights)
            weights = optax.apply_updates(weights, updates)
            jax.effects_barrier()
            assert len(called) == (each is inner)
        results.append(weights["kernel"])
    np.testing.assert_allclose(*results, rtol=1e-6)
