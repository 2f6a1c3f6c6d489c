"""Condensed training on eight devices: as on one, and what crosses devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import rigl_optax
from rigl_optax import Block, condensed
from rigl_optax.condensed.blocks import _convolution, _product
from tests.core.test_no_gather import collectives

pytestmark = pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")

P = PartitionSpec
AXES = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}
STEPS = 7  # rewirings at 1, 3 and 5
BLOCKS = {
    "conv": ((3, 2, 4, 6), Block(1, 2)),
    "into": ((6, 24), Block(3, 4, pool_by="l2")),
    "back": ((8, 24), Block(4, 3, pool_by="max")),
    "out": ((8, 5), Block(2, 2, pad=True)),
}


def random(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


def loss(kernels, images, wanted):
    """Each kind of product: a convolution, whose rows of pixels a GRU reads, and two matmuls."""
    x = jnp.tanh(condensed.convolve(images, kernels["conv"], strides=(1, 2))).mean(2)
    gates = jnp.split(x @ kernels["into"] + kernels["bias"], 3, axis=2)
    first = 0 * images[:, 0, 0, :1] + jnp.ones(8, images.dtype)
    keep = jnp.ones_like(x[:, :, :1]).swapaxes(0, 1)
    _, last = condensed.gru(tuple(g.swapaxes(0, 1) for g in gates), first, (kernels["back"],), keep)
    return jnp.mean((last @ kernels["out"] - wanted) ** 2)


TX = condensed.rigl(
    optax.adam(0.02),
    end=6,
    every=2,
    begin=1,
    drop_fraction=rigl_optax.constant_drop_fraction(0.5),
)


def ordinary(weights, state, *batch):
    value, grads = condensed.value_and_grad(loss)(weights, state.topologies, *batch)
    updates, state = TX.update(grads, state, weights)
    return optax.apply_updates(weights, updates), state, value


def rewiring(weights, state, *batch):
    value, *found = condensed.value_grad_and_scores(loss)(weights, state.topologies, *batch)
    return *TX.rewire(*found, state, weights), value


def setting():
    topologies = {
        name: condensed.random_topology(shape, 0.5, block, seed=i)
        for i, (name, (shape, block)) in enumerate(BLOCKS.items())
    }
    weights = {n: jnp.asarray(random(7, *t.values_shape)) for n, t in topologies.items()}
    # Beyond the edge of a padded layer there is nothing.
    is_last = topologies["out"].cols[:, None, None] == 2
    weights["out"] = jnp.where(is_last & (jnp.arange(2) == 1), 0, weights["out"])
    return weights | {"bias": jnp.zeros(24)}, topologies


def batch(t):
    return jnp.asarray(random(10 + t, 16, 4, 6, 4)), jnp.asarray(random(50 + t, 16, 5))


def run(place_weights=lambda x: x, place_batch=lambda x: x, compile_step=jax.jit):
    """Weights, state and losses after some steps; and what has been compiled."""
    weights, topologies = setting()
    weights = place_weights(weights)
    state = TX.init(weights, topologies)
    steps = {f: compile_step(f) for f in (ordinary, rewiring)}
    losses = []
    for t in range(STEPS):
        step = steps[rewiring if TX.is_rewiring_step(t) else ordinary]
        weights, state, value = step(weights, state, *place_batch(batch(t)))
        losses.append(float(value))
    return weights, state, losses


@functools.cache
def on_one_device():
    with jax.enable_x64(True):
        return jax.device_get(run())


def same(found):
    (weights, state, losses), wanted = jax.device_get(found), on_one_device()
    first = setting()[1]
    assert int(state.rewirings) == int(wanted[1].rewirings) == 3
    for name, topology in state.topologies.items():
        for got, expected in zip(
            (topology.rows, topology.cols),
            (wanted[1].topologies[name].rows, wanted[1].topologies[name].cols),
            strict=True,
        ):
            np.testing.assert_array_equal(got, expected, err_msg=name)
        assert not np.array_equal(topology.rows, first[name].rows), f"{name}: was not rewired"
    for got, expected in zip(
        jax.tree.leaves((weights, state.inner_state, losses)),
        jax.tree.leaves((wanted[0], wanted[1].inner_state, wanted[2])),
        strict=True,
    ):
        np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-12)


def spread(mesh, spec):
    return lambda tree: jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, spec)), tree)


def in_place(step):
    """Compiled so that weights and state stay cut up as they are."""

    def call(weights, state, *batch):
        shardings = jax.tree.map(lambda x: x.sharding, (weights, state))
        return jax.jit(step, out_shardings=(*shardings, None))(weights, state, *batch)

    return call


@pytest.mark.slow
@pytest.mark.parametrize("axes", AXES)
@pytest.mark.parametrize("spec", [P(), P("params")], ids=["whole", "parts"])
def test_training_as_on_one_device(spec, axes):
    """Values whole, a batch over one axis, the other idle; and values in parts as in FSDP."""
    mesh = jax.make_mesh((4, 2), ("data", "params"), axis_types=(AXES[axes],) * 2)
    examples = P("data") if spec == P() else P(("data", "params"))

    def place(weights):
        kernels = {name: weights[name] for name in BLOCKS}
        return spread(mesh, P())(weights) | spread(mesh, spec)(kernels)

    with jax.enable_x64(True), jax.set_mesh(mesh):
        weights, state, losses = run(place, spread(mesh, examples), in_place)
        for name in BLOCKS:
            adam = state.inner_state[0]
            for leaf in (weights[name], adam.mu[name], adam.nu[name]):
                assert leaf.sharding.is_equivalent_to(NamedSharding(mesh, spec), leaf.ndim)
        same((weights, state, losses))


# ------------------------------------------------------------------------- what crosses devices

KERNELS = {
    "matmul": ((16, 24), Block(4, 4), lambda k, x: x @ k, (64, 16)),
    "convolution": (
        (3, 3, 8, 16),
        Block(4, 4),
        lambda k, x: condensed.convolve(x, k),
        (8, 4, 4, 8),
    ),
    "gru": (
        (8, 24),
        Block(4, 4),
        lambda k, x: condensed.gru((x.swapaxes(0, 1),) * 3, x[:, 0], (k,), keep_of(x))[0],
        (16, 5, 8),
    ),
}


def keep_of(x):
    return jnp.ones_like(x[:, :, :1]).swapaxes(0, 1)


def kernel_case(name):
    """A loss, arguments, and bytes of the values and of the dense gradient."""
    shape, block, apply, x_shape = KERNELS[name]
    topology = condensed.random_topology(shape, 0.75, block)
    values = jnp.asarray(random(0, *topology.values_shape), jnp.float32)
    arguments = values, jnp.zeros(topology.grid), jnp.asarray(random(1, *x_shape), jnp.float32)

    def loss(values, probe, x):
        return jnp.sum(jnp.sin(apply(condensed.BlockSparse(values, topology, probe), x)))

    return loss, arguments, values.nbytes, 4 * int(np.prod(shape))


def compiled_gradients(loss, arguments, axes):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(axes,))
    with jax.set_mesh(mesh):
        values, probe, x = arguments
        placed = *spread(mesh, P())((values, probe)), spread(mesh, P("data"))(x)
        ordinary = jax.jit(jax.grad(loss, (0, 2))).lower(*placed).compile()
        rewiring = jax.jit(jax.grad(loss, (0, 1, 2))).lower(*placed).compile()
        return ordinary, rewiring, jax.device_get(rewiring(*placed))


@pytest.mark.parametrize("name", KERNELS)
def test_under_explicit_axes_sums_alone_cross_devices(name):
    """Of the stored values in an ordinary step; of the dense gradient, by columns, for scores."""
    loss, arguments, stored, dense = kernel_case(name)
    ordinary, rewiring, found = compiled_gradients(loss, arguments, AxisType.Explicit)
    wanted = jax.jit(jax.grad(loss, (0, 1, 2)))(*arguments)
    for got, expected in zip(found, wanted, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
    assert collectives(ordinary.as_text()) == [("all-reduce", stored, 1)]
    crossing = collectives(rewiring.as_text())
    assert {operation for operation, _, _ in crossing} == {"all-reduce"}
    assert sum(size * times for _, size, times in crossing) == stored + dense
    assert max(size for _, size, _ in crossing) < dense


def test_in_a_shard_map_gradients_and_scores_are_those_of_the_whole_batch():
    loss, arguments, stored, dense = kernel_case("convolution")
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))

    def of_all(values, probe, x):
        return jax.lax.psum(loss(values, probe, x), "data")

    mapped = jax.shard_map(of_all, mesh=mesh, in_specs=(P(), P(), P("data")), out_specs=P())
    step = jax.jit(jax.grad(mapped, (0, 1, 2))).lower(*arguments).compile()
    for got, expected in zip(
        step(*arguments), jax.jit(jax.grad(loss, (0, 1, 2)))(*arguments), strict=True
    ):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
    crossing = sum(size * times for _, size, times in collectives(step.as_text()))
    assert crossing == stored + dense


def test_under_auto_axes_what_the_page_says_crosses_devices(monkeypatch):
    """On the CPU: one sum for each block, or one for all where they are gathered.

    Of a convolution for all the rows of images that are taken at a time.
    """
    loss, arguments, stored, _ = kernel_case("matmul")
    blocks = arguments[0].shape[0]
    ordinary, _, _ = compiled_gradients(loss, arguments, AxisType.Auto)
    assert collectives(ordinary.as_text()) == [("all-reduce", stored, 1)]
    monkeypatch.setattr(_product, "GATHERED", 0)
    loss, arguments, stored, _ = kernel_case("matmul")
    ordinary, _, _ = compiled_gradients(loss, arguments, AxisType.Auto)
    assert collectives(ordinary.as_text()) == [("all-reduce", stored // blocks, blocks)]
    for size, times in ((_convolution.ROWS, 1), (0, 4)):
        monkeypatch.setattr(_convolution, "ROWS", size)
        loss, arguments, stored, _ = kernel_case("convolution")
        blocks = arguments[0].shape[0]
        ordinary, _, _ = compiled_gradients(loss, arguments, AxisType.Auto)
        crossing = collectives(ordinary.as_text())
        assert crossing == [("all-reduce", stored // blocks, blocks * times)]
