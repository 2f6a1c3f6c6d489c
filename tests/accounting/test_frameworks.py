"""The count works for parameters of every library, and for layers as people write them."""

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import pytest
from flax import linen, nnx

from rigl_optax.accounting import count_flops


def shape(*dims, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(dims, dtype)


def products(cost):
    return {path: flops for path, flops in cost.by_parameter.items() if flops}


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(3, 8, (3, 3), strides=2, rngs=rngs)
        self.depthwise = nnx.Conv(8, 8, (3, 3), feature_group_count=8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.up = nnx.ConvTranspose(8, 4, (2, 2), strides=(2, 2), rngs=rngs)
        self.head = nnx.Linear(4, 5, rngs=rngs)

    def __call__(self, x):
        x = jax.nn.gelu(self.norm(self.depthwise(self.conv(x))))
        return self.head(self.up(x).mean((1, 2)))


@pytest.mark.parametrize("pure", [False, True])
def test_nnx(pure):
    model = nnx.eval_shape(lambda: NnxNet(nnx.Rngs(0)))
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    if pure:
        params, rest = nnx.to_pure_dict(params), nnx.to_pure_dict(rest)

    def forward(params, rest, x):
        return nnx.merge(graphdef, params, rest)(x)

    cost = count_flops(forward, params, rest, shape(2, 16, 16, 3))
    assert products(cost) == {
        "conv/kernel": 2 * 2 * 8 * 8 * 9 * 3 * 8,
        "depthwise/kernel": 2 * 2 * 8 * 8 * 9 * 8,
        "up/kernel": 2 * 2 * 8 * 8 * 4 * 8 * 4,
        "head/kernel": 2 * 2 * 4 * 5,
    }
    assert cost.unattributed == () and cost.notes == ()
    assert cost.elementwise > 0


@pytest.mark.parametrize(("cell", "gates"), [(nnx.LSTMCell, 4), (nnx.GRUCell, 3)])
def test_recurrent_nnx(cell, gates):
    model = nnx.eval_shape(lambda: nnx.RNN(cell(6, 10, rngs=nnx.Rngs(0))))
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def forward(params, rest, x):
        return nnx.merge(graphdef, params, rest)(x)

    cost = count_flops(forward, params, rest, shape(2, 7, 6))
    assert cost.total == 2 * 2 * 7 * (6 + 10) * 10 * gates
    assert cost.unattributed == () and cost.notes == ()


def test_attention_scores_are_unattributed():
    make = lambda: nnx.MultiHeadAttention(2, 8, decode=False, rngs=nnx.Rngs(0))
    graphdef, params, rest = nnx.split(nnx.eval_shape(make), nnx.Param, ...)

    def forward(params, rest, x):
        return nnx.merge(graphdef, params, rest)(x)

    cost = count_flops(forward, params, rest, shape(3, 5, 8))
    assert set(products(cost).values()) == {2 * 3 * 5 * 8 * 8} and len(products(cost)) == 4
    assert [u.flops for u in cost.unattributed] == [2 * 3 * 5 * 5 * 8] * 2
    assert {u.why for u in cost.unattributed} == {"no parameter takes part"}


def test_linen_scanned_over_layers():
    class Block(linen.Module):
        @linen.compact
        def __call__(self, x, _):
            return jax.nn.relu(linen.Dense(8)(x)), None

    stack = linen.scan(
        linen.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=6
    )()
    x = shape(2, 8)
    params = jax.eval_shape(stack.init, jax.random.key(0), x, None)["params"]
    cost = count_flops(lambda p, x: stack.apply({"params": p}, x, None)[0], params, x)
    assert products(cost) == {"Dense_0/kernel": 6 * 2 * 2 * 8 * 8}
    assert cost.unattributed == () and cost.notes == ()


def test_haiku():
    net = hk.without_apply_rng(
        hk.transform(lambda x: hk.Linear(5)(jax.nn.relu(hk.Conv1D(4, 3)(x)).mean(1)))
    )
    x = shape(2, 10, 6)
    params = jax.eval_shape(net.init, jax.random.key(0), x)
    assert products(count_flops(net.apply, params, x)) == {
        "conv1_d/w": 2 * 2 * 10 * 3 * 6 * 4,
        "linear/w": 2 * 2 * 4 * 5,
    }


def test_equinox():
    model = eqx.nn.MLP(6, 5, 8, 1, key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)
    cost = count_flops(lambda p, x: jax.vmap(eqx.combine(p, static))(x), params, shape(2, 6))
    assert products(cost) == {"layers/0/weight": 2 * 2 * 6 * 8, "layers/1/weight": 2 * 2 * 8 * 5}


def test_bare_array_and_namedtuple_of_parameters():
    assert count_flops(lambda p, x: x @ p, shape(4, 3), shape(2, 4)).by_parameter == {"": 48}


@pytest.mark.parametrize("raw", [False, True])
def test_dropped_connections_and_noisy_weights(raw):
    def layer(p, key, x):
        kept = jax.random.bernoulli(key, 0.5, p.shape)
        noisy = p * jax.random.normal(key, p.shape)
        return x @ jnp.where(kept, p, 0) + x @ noisy

    key = shape(2, dtype=jnp.uint32) if raw else jax.eval_shape(lambda: jax.random.key(0))
    cost = count_flops(layer, shape(4, 3), key, shape(2, 4))
    assert cost.by_parameter == {"": 2 * 48} and cost.notes == ()


def test_straight_through_quantisation_and_top_k_masks():
    def layer(p, x):
        scale = jnp.max(jnp.abs(p)) / 127
        quantised = jnp.round(p / scale).astype(jnp.int8).astype(jnp.float32) * scale
        threshold = jax.lax.top_k(jnp.abs(p).ravel(), 6)[0][-1]
        return x @ quantised + x @ jnp.where(jnp.abs(p) >= threshold, p, 0)

    cost = count_flops(layer, shape(4, 3), shape(2, 4))
    assert cost.by_parameter == {"": 2 * 48} and cost.notes == ()
