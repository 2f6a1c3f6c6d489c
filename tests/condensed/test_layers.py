"""NNX layers with condensed kernels: what they compute, and how they are trained."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import rigl_optax
from rigl_optax import Block, condensed
from rigl_optax.condensed import layers

pytestmark = pytest.mark.xdist_group("condensed_layers")  # they share what a fixture has trained


class Network(nnx.Module):
    def __init__(self, rngs):
        keys = {"sparsity": 0.5, "block": Block(2, 2), "rngs": rngs}
        self.layers = nnx.List(
            [
                layers.SparseConv(4, 8, (3, 3), seed=1, strides=(2, 2), **keys),
                layers.SparseLinear(8, 6, seed=2, **keys),
            ]
        )
        self.head = nnx.Linear(6, 2, rngs=rngs)

    def __call__(self, x):
        x = jnp.tanh(self.layers[0](x)).mean((1, 2))
        return self.head(jnp.tanh(self.layers[1](x)))


def array(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def test_layers_compute_what_flax_does():
    sparse = layers.SparseLinear(
        7, 6, sparsity=0.5, block=Block(2, 3, pad=True), seed=3, rngs=nnx.Rngs(0)
    )
    dense = nnx.Linear(7, 6, rngs=nnx.Rngs(0))
    sparse.bias[...] = dense.bias[...] = array(1, 6)
    dense.kernel[...] = sparse.bound().dense()
    assert dense.kernel.shape == (7, 6) and (np.asarray(dense.kernel) == 0).mean() > 0.3
    np.testing.assert_allclose(sparse(array(2, 5, 7)), dense(array(2, 5, 7)), rtol=1e-5, atol=1e-6)
    keys = {"strides": (2, 1), "padding": "VALID", "rngs": nnx.Rngs(0)}
    conv = layers.SparseConv(4, 6, (3, 2), sparsity=0.5, block=Block(2, 3), seed=4, **keys)
    reference = nnx.Conv(4, 6, (3, 2), **keys)
    reference.kernel[...] = conv.bound().dense()
    x = array(5, 2, 6, 5, 4)
    np.testing.assert_allclose(conv(x), reference(x), rtol=1e-4, atol=1e-5)


def test_dtype_of_the_computation():
    layer = layers.SparseLinear(
        8, 6, sparsity=0.5, block=Block(2, 3), seed=3, dtype=jnp.bfloat16, use_bias=False,
        rngs=nnx.Rngs(0),
    )  # fmt: skip
    assert layer(jnp.ones((2, 8))).dtype == jnp.bfloat16
    assert layer.kernel.dtype == jnp.float32 and layer.bias is None


def targets(x):
    return 3 * x.mean((1, 2))[:, :2]


@pytest.fixture(scope="module")
def trained():
    model, x = Network(nnx.Rngs(0)), array(0, 8, 6, 6, 4)
    y = targets(x)
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    weights = nnx.to_pure_dict(params)
    tx = condensed.rigl(
        optax.adam(3e-2), end=40, every=10, drop_fraction=rigl_optax.constant_drop_fraction(0.4)
    )
    state = tx.init(weights, layers.topologies(model))

    def loss(kernels):
        return jnp.mean((nnx.merge(graphdef, kernels, rest)(x) - y) ** 2)

    @jax.jit
    def ordinary(weights, state):
        value, grads = condensed.value_and_grad(loss)(weights, state.topologies)
        updates, state = tx.update(grads, state, weights)
        return optax.apply_updates(weights, updates), state, value

    @jax.jit
    def rewiring(weights, state):
        value, *found = condensed.value_grad_and_scores(loss)(weights, state.topologies)
        return *tx.rewire(*found, state, weights), value

    losses, first = [], state
    for t in range(60):
        take = rewiring if tx.is_rewiring_step(t) else ordinary
        weights, state, value = take(weights, state)
        losses.append(float(value))
    return model, weights, first, state, losses, x, loss


def test_a_model_of_layers_trains_and_rewires(trained):
    model, _, first, state, losses, _, _ = trained
    assert list(first.topologies) == ["layers/0/kernel", "layers/1/kernel"]
    assert losses[-1] < 0.5 * losses[0]
    assert int(state.rewirings) == 4
    for path, topology in state.topologies.items():
        assert not np.array_equal(topology.mask(), first.topologies[path].mask())
        assert int(topology.mask().sum()) == first.topologies[path].blocks


def test_trained_weights_go_back_into_the_model(trained):
    model, weights, _, state, _, x, loss = trained
    layers.write(model, weights, state.topologies)
    y = targets(x)
    written = jnp.mean((model(x) - y) ** 2)
    bound = loss(condensed.bind(weights, state.topologies))
    np.testing.assert_allclose(written, bound, rtol=1e-5)
    assert layers.topologies(model).keys() == state.topologies.keys()


def test_initial_values_have_the_variance_of_their_fan_in():
    topology = condensed.random_topology((512, 512), 0.75, Block(16, 16))
    values = condensed.random_values(jax.random.key(0), topology)
    assert np.std(values) == pytest.approx((0.25 * 512) ** -0.5, rel=0.02)
    plain = condensed.random_values(jax.random.key(0), topology, sparse_aware=False)
    assert np.std(plain) == pytest.approx(512**-0.5, rel=0.02)
    conv = condensed.random_topology((3, 3, 65, 65), 0.5, Block(16, 16, pad=True))
    values = condensed.random_values(jax.random.key(0), conv, jnp.bfloat16)
    assert values.dtype == jnp.bfloat16
    stored = condensed.BlockSparse(values, conv)
    # Beyond the edge there is nothing: all that is stored is seen.
    assert float(jnp.sum(values != 0)) == float(jnp.sum(stored.dense() != 0))
