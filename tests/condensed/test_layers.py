"""NNX layers with condensed kernels: what they compute, and how they are trained."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import rigl_optax
from rigl_optax import Block, _paths, condensed
from rigl_optax.condensed import layers
from rigl_optax.models import recurrent
from rigl_optax.models.lenet import LeNet
from rigl_optax.models.transformer import GPT, dense_layers


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


RECURRENT = {"gru": layers.SparseGRU, "lstm": layers.SparseLSTM}


def recurrent_pair(cell):
    """A layer, and the dense one of our models with the same weights."""
    sparse = RECURRENT[cell](
        7, 8, sparsity=0.5, block=Block(2, 3, pad=True), seed=3, rngs=nnx.Rngs(0)
    )
    dense = nnx.eval_shape(lambda: recurrent.Layer(cell, 7, 8, fused=True, rngs=nnx.Rngs(0)))
    sparse.input.bias[...] = array(1, *sparse.input.bias.shape)
    weights = nnx.to_pure_dict(nnx.state(sparse, nnx.Param))
    nnx.update(dense, condensed.densify(weights, layers.topologies(sparse)))
    return sparse, dense, weights


@pytest.mark.parametrize("cell", RECURRENT)
def test_recurrent_layers_compute_what_the_dense_ones_do(cell):
    sparse, dense, weights = recurrent_pair(cell)
    x, carry = array(2, 3, 5, 7), array(3, *sparse.initial_carry(3).shape)
    keep = jnp.ones((3, 5)).at[1, 2].set(0)

    def loss(layer, carry, keep):
        out, last = layer(x, carry, keep)
        return jnp.sum(jnp.sin(out)) + jnp.sum(last**2)

    def dense_loss(layer, carry, keep):
        out, last = layer(x.swapaxes(0, 1), carry, keep.T)
        return jnp.sum(jnp.sin(out)) + jnp.sum(last**2)

    # From nothing, and from a carry that one lane forgets.
    start = sparse.initial_carry(3), jnp.ones((3, 5))
    dense_step = nnx.jit(nnx.value_and_grad(dense_loss))
    value, _ = dense_step(dense, *start)
    np.testing.assert_allclose(nnx.jit(loss)(sparse, None, None), value, rtol=1e-5)
    value, wanted = dense_step(dense, carry, keep)
    # As a training step has it: kernels bound to topologies and probes, in the place of values.
    topologies = layers.topologies(sparse)
    assert list(topologies) == ["input/kernel", "recurrent/kernel"]
    graphdef, _, rest = nnx.split(sparse, nnx.Param, ...)
    step = condensed.value_grad_and_scores(
        lambda kernels: loss(nnx.merge(graphdef, kernels, rest), carry, keep)
    )
    got, grads, scores = jax.jit(step)(weights, topologies)
    np.testing.assert_allclose(got, value, rtol=1e-5)
    wanted = nnx.to_pure_dict(wanted)
    for name, topology in topologies.items():
        part, gradient = name.split("/")[0], wanted[name.split("/")[0]]["kernel"]
        masked = jnp.where(topology.dense_mask(), gradient, 0)
        found = condensed.BlockSparse(grads[part]["kernel"], topology).dense()
        np.testing.assert_allclose(found, masked, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(scores[name], topology.block.pool(gradient), rtol=1e-4)
    np.testing.assert_allclose(grads["input"]["bias"], wanted["input"]["bias"], rtol=1e-4)


def test_recurrent_layers_take_trained_weights_back():
    sparse, _, weights = recurrent_pair("gru")
    x = array(2, 3, 5, 7)
    others = {
        name: condensed.random_topology(t.shape, 0.5, t.block, seed=9)
        for name, t in layers.topologies(sparse).items()
    }
    call = nnx.jit(lambda layer, x: layer(x)[0])
    before = call(sparse, x)
    layers.write(sparse, jax.tree.map(lambda w: 2 * w, weights), others)
    assert not np.allclose(call(sparse, x), before)
    for name, topology in layers.topologies(sparse).items():
        np.testing.assert_array_equal(topology.grid_mask(), others[name].grid_mask())
    np.testing.assert_array_equal(sparse.recurrent.kernel[...], 2 * weights["recurrent"]["kernel"])


def test_recurrent_layers_in_bfloat16():
    layer = layers.SparseLSTM(
        8, 4, sparsity=0.5, block=Block(2, 2), dtype=jnp.bfloat16, seed=1, rngs=nnx.Rngs(0)
    )
    out, carry = layer(jnp.ones((2, 3, 8)), keep_BxT=jnp.ones((2, 3)))
    assert out.dtype == carry.dtype == jnp.bfloat16
    assert layer.recurrent.kernel.dtype == jnp.float32
    # The two kernels are drawn apart: of one shape, they have other blocks.
    same = layers.SparseGRU(8, 8, sparsity=0.5, block=Block(2, 2), seed=1, rngs=nnx.Rngs(0))
    masks = [t.grid_mask() for t in layers.topologies(same).values()]
    assert not np.array_equal(*masks)


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
        assert not np.array_equal(topology.grid_mask(), first.topologies[path].grid_mask())
        assert int(topology.grid_mask().sum()) == first.topologies[path].number


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


@pytest.mark.parametrize("structure", [rigl_optax.Unstructured(), Block(4, 5, pad=True)])
def test_a_trained_model_becomes_condensed_layers(structure):
    def make():
        return LeNet((4, 4), classes=5, hidden=(20,), rngs=nnx.Rngs(0))

    model = make()
    model.head = nnx.Linear(5, 5, rngs=nnx.Rngs(1))  # a layer of Flax itself
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    tx = rigl_optax.static_sparse(optax.sgd(0.1), 0.5, structure=structure)
    state = tx.init(params)
    params = rigl_optax.apply_masks(params, state)
    nnx.update(model, params)
    x = array(1, 3, 4, 4)
    wanted = model.head(model(x))
    again = make()
    again.head = nnx.Linear(5, 5, rngs=nnx.Rngs(2))
    again = layers.condense(again, params, state.masks, structure)
    np.testing.assert_allclose(again.head(again(x)), wanted, rtol=1e-5, atol=1e-5)
    assert again.layers[0].kernel.size == int(state.masks["layers"][0]["kernel"].sum())
    assert "layers/0/kernel" in layers.topologies(again)
    with pytest.raises(ValueError, match="not those of the model: 'head/bias'"):
        layers.condense(make(), params, state.masks)


def test_a_model_is_drawn_as_itself_but_for_its_sparse_kernels():
    make = lambda: GPT(embedding=16, depth=1, heads=2, context=8, rngs=nnx.Rngs(3))
    dense = rigl_optax.DenseLayers(dense_layers("uniform"))
    start = layers.initialize(
        make, rigl_optax.uniform(0.5, dense=dense), Block(8, 8), key=jax.random.key(1), seed=5
    )
    params = jax.jit(lambda: nnx.to_pure_dict(nnx.state(make(), nnx.Param)))()
    own = dict(_paths.flatten_with_paths(params))
    names = {"attention/qkv", "attention/out", "mlp/up", "mlp/down"}
    assert start.topologies.keys() == {f"blocks/0/{name}/kernel" for name in names}
    for position, (path, leaf) in enumerate(_paths.flatten_with_paths(start.weights)):
        if path in start.topologies:
            expected = condensed.random_topology(
                own[path].shape, 0.5, Block(8, 8), seed=5, position=position
            )
            jax.tree.map(np.testing.assert_array_equal, start.topologies[path], expected)
            assert leaf.shape == expected.values_shape and (leaf != 0).all()
        else:
            np.testing.assert_allclose(leaf, own[path], rtol=1e-6)
    kernels = condensed.bind(start.weights, start.topologies)
    model = nnx.merge(start.graphdef, kernels, start.rest)
    logits = jax.eval_shape(lambda x: model(x), jax.ShapeDtypeStruct((2, 8), jnp.uint8))
    assert logits.shape == (2, 8, 256)


def test_a_model_is_drawn_whose_dense_kernels_would_not_fit():
    """They would take 38 GB; their draws are compiled away."""
    make = lambda: GPT(embedding=2**14, depth=3, heads=2, vocabulary=2, rngs=nnx.Rngs(0))
    dense = rigl_optax.DenseLayers(dense_layers("uniform"))
    start = layers.initialize(
        make, rigl_optax.uniform(0.9999, dense=dense), Block(512, 512), key=jax.random.key(0)
    )
    assert sum(np.prod(t.shape) for t in start.topologies.values()) * 4 > 38e9
    assert sum(x.nbytes for x in jax.tree.leaves(start.weights)) < 20e6
