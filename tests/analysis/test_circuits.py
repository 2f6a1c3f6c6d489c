"""Ablation replaces what is left out by its mean, and what stays is needed part by part."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rigl_optax.analysis import circuits
from rigl_optax.models import transformer

OUT, DOWN = "blocks/0/attention/out", "blocks/0/mlp/down"


class Two(nnx.Module):
    """Two linear maps with a ReLU between them."""

    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.first, self.last = nnx.Linear(3, 4, rngs=rngs), nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.last(nnx.relu(self.first(x)))


def restated(model, x, keep, mean):
    hidden = np.maximum(np.asarray(x) @ model.first.kernel[...] + model.first.bias[...], 0)
    hidden = np.where(np.repeat(keep, 4 // len(keep)), hidden, mean)
    return hidden @ model.last.kernel[...] + model.last.bias[...]


def test_ablated_units_are_at_their_mean():
    model, x = Two(), jax.random.normal(jax.random.key(0), (5, 2, 3))
    means = circuits.mean_inputs(model, ["last"], x)
    hidden = nnx.relu(model.first(x))
    np.testing.assert_allclose(means["last"], np.mean(hidden, (0, 1)), rtol=1e-6)
    for keep in ([True, False, False, True], [False, True]):
        found = circuits.ablated(model, {"last": keep}, means)(x)
        np.testing.assert_allclose(found, restated(model, x, keep, means["last"]), rtol=1e-5)
    # With all units it is the model, and the model itself has not been changed.
    whole = circuits.ablated(model, {"last": np.ones(2, bool)}, means)(x)
    assert (whole == model(x)).all()
    assert type(model.last) is nnx.Linear


def test_derivatives_say_what_units_are_worth():
    model, x = Two(), jnp.ones((1, 3))
    means = {"last": jnp.zeros(4)}

    def output(keep):
        return circuits.ablated(model, {"last": keep}, means)(x)[0, 0]

    # The last map is linear, so the first order is all there is.
    worth = jax.jit(jax.grad(output))(jnp.ones(4))
    for i in range(4):
        without = output(jnp.ones(4).at[i].set(0))
        np.testing.assert_allclose(output(jnp.ones(4)) - without, worth[i], atol=1e-6)


def test_heads_and_units_of_a_transformer():
    model = transformer.GPT(embedding=16, depth=1, heads=2, rngs=nnx.Rngs(0))
    tokens = jnp.arange(12).reshape(2, 6)
    means = circuits.mean_inputs(model, [OUT, DOWN], tokens)
    nothing = {OUT: np.zeros(2), DOWN: np.zeros(64)}
    # Without attention and MLP all that is left is the byte itself, and two constants.
    x = model.embedding(tokens) + means[OUT] @ model.blocks[0].attention.out.kernel[...]
    x = model.norm(x + means[DOWN] @ model.blocks[0].mlp.down.kernel[...])
    np.testing.assert_allclose(
        circuits.ablated(model, nothing, means)(tokens), model.head(x), atol=1e-6
    )
    one_head = circuits.ablated(model, {OUT: [1, 0]}, means)
    assert not np.allclose(one_head(tokens), model(tokens), atol=1e-6)


def test_no_part_that_stays_can_be_left_out():
    rng = np.random.default_rng(0)
    for _ in range(20):
        worth = rng.random(30)
        pairs = rng.integers(0, 30, (5, 2))

        def loss(keep, worth=worth, pairs=pairs):
            # Some parts do the same work: one of the two is enough.
            both = ~keep[pairs[:, 0]] & ~keep[pairs[:, 1]]
            return worth[~keep].sum() + both.sum()

        keep = circuits.smallest(loss, np.argsort(worth), 2.0)
        assert loss(keep) <= 2.0 and 0 < keep.sum() < 30
        for i in np.flatnonzero(keep):
            without = keep.copy()
            without[i] = False
            assert loss(without) > 2.0
    assert not circuits.smallest(lambda keep: 0.0, range(3), 0.0).any()


def test_mistakes_are_named():
    model, x = Two(), jnp.ones((1, 3))
    means = circuits.mean_inputs(model, ["last"], x)
    with pytest.raises(ValueError, match="layer 'middle': the model has no such layer"):
        circuits.mean_inputs(model, ["middle"], x)
    with pytest.raises(ValueError, match="layer 'first': no mean; there are 'last'"):
        circuits.ablated(model, {"first": [1]}, means)
    with pytest.raises(ValueError, match="divides the 4 features"):
        circuits.ablated(model, {"last": [1, 1, 0]}, means)
    twice = nnx.Sequential(model.last, nnx.Linear(2, 4, rngs=nnx.Rngs(0)), model.last)
    with pytest.raises(ValueError, match="'layers/1/kernel': the model has no such layer"):
        circuits.mean_inputs(twice, ["layers/1/kernel"], jnp.ones((1, 4)))
    with pytest.raises(ValueError, match=r"above limit=0.5"):
        circuits.smallest(lambda keep: 1.0, range(3), 0.5)
    with pytest.raises(ValueError, match="must list 0 to 2, each once"):
        circuits.smallest(lambda keep: 0.0, [0, 1, 1], 0.5)


def test_a_layer_must_be_called_once():
    class Unused(nnx.Module):
        def __init__(self) -> None:
            self.spare = nnx.Linear(2, 2, rngs=nnx.Rngs(0))

        def __call__(self, x: jax.Array) -> jax.Array:
            return x

    with pytest.raises(ValueError, match="'spare' was called 0 times"):
        circuits.mean_inputs(Unused(), ["spare"], jnp.ones((1, 2)))
