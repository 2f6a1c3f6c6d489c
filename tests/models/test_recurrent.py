import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import rigl_optax
from rigl_optax import condensed
from rigl_optax.models import recurrent

SMALL = {"vocabulary": 11, "embedding": 6, "readout": (7, 6)}


def tokens(lanes, time, seed=0):
    return np.random.default_rng(seed).integers(0, 11, (lanes, time)).astype(np.uint8)


def model(cell, **keys):
    return recurrent.RecurrentLM(cell, (8,), **(SMALL | keys), rngs=nnx.Rngs(0))


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_the_paper_s_model_has_its_number_of_weights(cell):
    params = nnx.state(nnx.eval_shape(lambda: recurrent.RecurrentLM(cell, rngs=nnx.Rngs(0))))
    kernels = [p for p in jax.tree.leaves(params) if p.ndim == 2]
    gates = {"gru": 3, "lstm": 4}[cell]
    assert sum(k.size for k in kernels) == 32_768 + gates * (128 + 512) * 512 + 131_072 + 32_768
    if cell == "gru":
        assert sum(k.size for k in kernels) == 1_179_648  # with the paper's embedding tied


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_single_weights_give_the_same_and_are_for_inference(cell):
    rng = np.random.default_rng(0)
    gates = {"gru": 3, "lstm": 4}[cell]
    masks = {name: rng.random((n, gates * 8)) < 0.4 for name, n in (("input", 5), ("recurrent", 8))}
    kernels = {name: rng.standard_normal(m.shape) * m for name, m in masks.items()}
    kernels = {name: jnp.asarray(x, jnp.float32) for name, x in kernels.items()}
    x = jnp.asarray(rng.standard_normal((7, 3, 5)), jnp.float32)

    def run(kernels):
        layer = recurrent.Layer(cell, 5, 8, fused=True, rngs=nnx.Rngs(0))
        layer.input.kernel.set_value(kernels["input"])
        layer.recurrent.kernel.set_value(kernels["recurrent"])
        return layer(x, jnp.ones((3, 8 * recurrent.STATES[cell])), jnp.ones((7, 3)))

    single = condensed.bind(*condensed.condense_csr(kernels, masks))
    for found, expected in zip(run(single), run(kernels), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5)
    with pytest.raises(ValueError, match="is for inference and has no gradient"):
        jax.grad(lambda k: run(k)[0].sum(), allow_int=True)(single)


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_outputs_and_gradients_are_those_of_flax_s_cell(cell):
    ours = recurrent.Layer(cell, 5, 8, fused=True, rngs=nnx.Rngs(0))
    kind = nnx.GRUCell if cell == "gru" else nnx.OptimizedLSTMCell
    theirs = kind(5, 8, rngs=nnx.Rngs(1))
    x = np.random.default_rng(0).standard_normal((7, 3, 5)).astype(np.float32)
    weights = {"input": ours.input.kernel[...], "recurrent": ours.recurrent.kernel[...]}
    weights["bias"] = 0.1 * jnp.arange(ours.input.bias.shape[0], dtype=jnp.float32)

    def run_ours(weights, x):
        layer = nnx.clone(ours)
        layer.input.kernel[...] = weights["input"]
        layer.recurrent.kernel[...] = weights["recurrent"]
        layer.input.bias[...] = weights["bias"]
        states = jnp.zeros((3, 8 * recurrent.STATES[cell]))
        return layer(x, states, jnp.ones((7, 3)))[0]

    def run_theirs(weights, x):
        each = nnx.clone(theirs)
        each.dense_i.kernel[...] = weights["input"]
        each.dense_h.kernel[...] = weights["recurrent"]
        biased = each.dense_i if cell == "gru" else each.dense_h
        biased.bias[...] = weights["bias"]
        return nnx.RNN(each, time_major=True)(x)

    outcomes = []
    for run in (run_ours, run_theirs):
        loss = lambda weights, x, run=run: jnp.sum(jnp.sin(run(weights, x)))
        outcomes.append((run(weights, x), jax.grad(loss, argnums=(0, 1))(weights, x)))
    for ours_, theirs_ in zip(*map(jax.tree.leaves, outcomes), strict=True):
        np.testing.assert_allclose(ours_, theirs_, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_a_sequence_in_pieces_is_the_sequence(cell):
    net = model(cell)
    whole, last = net(tokens(3, 10), net.initial_carry(3))
    first, carry = net(tokens(3, 10)[:, :4], net.initial_carry(3))
    second, carry = net(tokens(3, 10)[:, 4:], carry)
    np.testing.assert_allclose(jnp.concatenate([first, second], 1), whole, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(carry[0], last[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_a_reset_forgets_all_that_was_before(cell):
    net = model(cell)
    resets = np.zeros((3, 10), bool)
    resets[1, 4] = True
    found, _ = net(tokens(3, 10), net.initial_carry(3), resets)
    plain, _ = net(tokens(3, 10), net.initial_carry(3))
    fresh, _ = net(tokens(3, 10)[:, 4:], net.initial_carry(3))
    np.testing.assert_allclose(found[1, :4], plain[1, :4], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found[1, 4:], fresh[1], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found[::2], plain[::2], rtol=1e-5, atol=1e-6)


def test_no_byte_sees_those_after_it():
    net = model("gru")
    other = tokens(2, 9)
    other[:, 5:] += 1
    a, b = (net(t % 11, net.initial_carry(2))[0] for t in (tokens(2, 9), other))
    np.testing.assert_array_equal(a[:, :5], b[:, :5])
    assert not np.array_equal(a[:, 5:], b[:, 5:])


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_separate_gates_compute_the_same_and_are_layers_of_their_own(cell):
    fused, separate = model(cell), model(cell, fused=False)
    a, b = (net(tokens(2, 5), net.initial_carry(2))[0] for net in (fused, separate))
    np.testing.assert_allclose(a, b, rtol=1e-6)
    params = nnx.to_pure_dict(nnx.state(separate, nnx.Param))
    layers = rigl_optax.uniform(0.5, overrides={r".*recurrent.*": 0.75})(params)
    for gate in recurrent.GATES[cell]:
        assert layers[f"layers/0/recurrent/{gate}/kernel"] == 0.75
        assert layers[f"layers/0/input/{gate}/kernel"] == 0.5


def test_the_embedding_is_dense_by_default_and_all_else_with_two_axes_is_sparse():
    params = nnx.to_pure_dict(nnx.state(model("gru"), nnx.Param))
    assert set(rigl_optax.uniform(0.5)(params)) == {
        "layers/0/input/kernel",
        "layers/0/recurrent/kernel",
        "readout/0/kernel",
        "readout/1/kernel",
    }


def test_several_layers_and_untied_logits():
    net = recurrent.RecurrentLM(
        "lstm", (8, 9), **(SMALL | {"readout": ()}), tied=False, rngs=nnx.Rngs(0)
    )
    logits, carry = net(tokens(2, 3), net.initial_carry(2))
    assert logits.shape == (2, 3, 11) and [c.shape for c in carry] == [(2, 16), (2, 18)]


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"cell": "rnn"}, "cell='rnn': must be one of gru, lstm"),
        ({"hidden": (0,)}, "at least 1"),
        ({"hidden": ()}, "one layer or more"),
        ({"readout": (256,)}, "the last width is 256, the embedding 128"),
    ],
)
def test_what_makes_no_sense_is_refused(keys, told):
    with pytest.raises(ValueError, match=told):
        recurrent.RecurrentLM(**keys, rngs=nnx.Rngs(0))
