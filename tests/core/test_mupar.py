import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import rigl_optax

PARAMS = {
    "embedding": {"embedding": jnp.ones((8, 20))},
    "a": {"kernel": jnp.ones((20, 40)), "bias": jnp.ones(40)},
    "b": {"kernel": jnp.ones((40, 20), jnp.bfloat16)},
}


def test_rates_follow_width_and_the_density_of_each_layer():
    layers = rigl_optax.erk(0.8)
    factors = rigl_optax.mupar_factors(PARAMS, layers, width=4.0)
    sparsities = layers(PARAMS)
    for name in "ab":
        density = 1 - sparsities[f"{name}/kernel"]
        assert factors[name]["kernel"] == pytest.approx(1 / (4 * density))
    assert factors["a"]["bias"] == factors["embedding"]["embedding"] == 1.0
    again = rigl_optax.mupar_factors(jax.eval_shape(lambda: PARAMS), 0.8, width=4.0)
    assert again == factors


def test_a_dense_network_is_scaled_by_its_width():
    factors = rigl_optax.mupar_factors(PARAMS, rigl_optax.uniform(0.0), width=2.0)
    assert factors["a"] == {"kernel": 0.5, "bias": 1.0}


def test_factors_multiply_rates_inside_a_sparse_method():
    factors = rigl_optax.mupar_factors(PARAMS, 0.8)
    inner = optax.chain(optax.adam(1e-2), rigl_optax.scale_by_factors(factors))
    ours, plain = (rigl_optax.static_sparse(x, 0.8) for x in (inner, optax.adam(1e-2)))
    state = ours.init(PARAMS)
    params = rigl_optax.apply_masks(PARAMS, state)
    grads = jax.tree.map(jnp.ones_like, params)
    scaled, _ = ours.update(grads, state, params)
    unscaled, _ = plain.update(grads, plain.init(PARAMS), params)
    for name, (x, y, f) in enumerate(
        zip(*map(jax.tree.leaves, (scaled, unscaled, factors)), strict=True)
    ):
        assert x.dtype == y.dtype
        expected = np.asarray(y, np.float32) * f
        np.testing.assert_allclose(np.asarray(x, np.float32), expected, rtol=1e-2, err_msg=name)


@pytest.mark.parametrize("width", [0.0, -1.0, float("nan"), float("inf"), "wide", True])
def test_a_width_that_makes_no_sense_is_refused(width):
    with pytest.raises(ValueError, match="width="):
        rigl_optax.mupar_factors(PARAMS, 0.8, width)
