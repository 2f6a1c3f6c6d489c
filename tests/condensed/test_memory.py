"""What a condensed layer takes, weights, gradients and optimizer state, follows its density."""

import jax
import jax.numpy as jnp
import optax
import pytest

from rigl_optax import Block, condensed

WIDTH, BATCH = 1024, 8


@pytest.mark.parametrize("sparsity", [0.9, 0.95, 0.98])
def test_state_is_at_most_a_quarter_above_density(sparsity):
    shape = (WIDTH, WIDTH)
    topologies = {"w": condensed.random_topology(shape, sparsity, Block(32, 32))}
    weights = {"w": jnp.zeros(topologies["w"].values_shape)}
    tx = condensed.rigl(optax.adam(1e-3), end=100)
    state = tx.init(weights, topologies)
    x = jnp.ones((BATCH, WIDTH))

    def loss(kernels, x):
        return jnp.mean((x @ kernels["w"]) ** 2)

    def ordinary(weights, state, x):
        _, grads = condensed.value_and_grad(loss)(weights, state.topologies, x)
        assert grads["w"].shape == weights["w"].shape
        updates, state = tx.update(grads, state, weights)
        return optax.apply_updates(weights, updates), state

    def rewiring(weights, state, x):
        _, grads, scores = condensed.value_grad_and_scores(loss)(weights, state.topologies, x)
        return tx.rewire(grads, scores, state, weights)

    dense = WIDTH * WIDTH * 4
    for step in (ordinary, rewiring):
        compiled = jax.jit(step, donate_argnums=(0, 1)).lower(weights, state, x).compile()
        memory = compiled.memory_analysis()
        held = memory.argument_size_in_bytes - x.nbytes  # weights, two moments, indices
        assert held + weights["w"].nbytes <= 1.25 * (1 - sparsity) * 4 * dense
        assert memory.temp_size_in_bytes < dense / 2  # at no time is there a dense array
