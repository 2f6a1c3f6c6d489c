"""The same masks and weights wherever the arrays live."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import rigl_optax
from tests.core import sharded_program as program

pytestmark = pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")

METHODS = ["rigl", "sparse_evolutionary_training"]
SPECS = {
    "replicated": (PartitionSpec(), PartitionSpec()),
    "rows": (PartitionSpec("x", None), PartitionSpec(None, None, None, "x")),
    "columns": (PartitionSpec(None, "x"), PartitionSpec(None, None, None, "x")),
    "both": (PartitionSpec("x", "y"), PartitionSpec(None, None, "y", "x")),
}


def mesh_of(devices, axis_type):
    shape = {1: (1, 1), 8: (4, 2)}[devices]
    return jax.make_mesh(
        shape, ("x", "y"), axis_types=(axis_type,) * 2, devices=jax.devices()[:devices]
    )


def placer(mesh, specs):
    kernel, conv = specs

    def place(tree):
        return {
            "a": {
                "kernel": jax.device_put(tree["a"]["kernel"], NamedSharding(mesh, kernel)),
                "bias": jax.device_put(
                    tree["a"]["bias"], NamedSharding(mesh, PartitionSpec(*kernel[1:2]))
                ),
            },
            "conv": {"kernel": jax.device_put(tree["conv"]["kernel"], NamedSharding(mesh, conv))},
        }

    return place


@pytest.fixture(scope="module")
def expected():
    """Eager, one device, no mesh."""
    return {m: jax.device_get(program.run(program.build(m), jit=False)) for m in METHODS}


def same(actual, expected):
    params, state = jax.device_get(actual)
    jax.tree.map(np.testing.assert_array_equal, state.masks, expected[1].masks)
    jax.tree.map(np.testing.assert_array_equal, params, expected[0])
    jax.tree.map(np.testing.assert_array_equal, state.inner_state, expected[1].inner_state)
    assert state.rewirings == expected[1].rewirings == 3
    assert state.healed == 0


@pytest.mark.parametrize("method", METHODS)
def test_eager_and_jit(method, expected):
    same(program.run(program.build(method), jit=True), expected[method])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize(("devices", "specs"), [(1, "both"), *((8, specs) for specs in SPECS)])
def test_any_placement(method, axis_type, specs, devices, expected):
    mesh = mesh_of(devices, axis_type)
    place = placer(mesh, SPECS[specs])
    with jax.set_mesh(mesh):
        params, state = program.run(program.build(method), place=place)
        for p, m in zip(jax.tree.leaves(params), jax.tree.leaves(state.masks), strict=True):
            assert m.sharding.is_equivalent_to(p.sharding, p.ndim), (m.sharding, p.sharding)
        same((params, state), expected[method])


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_eager_on_sharded_arrays(axis_type, expected):
    mesh = mesh_of(8, axis_type)
    with jax.set_mesh(mesh):
        result = program.run(
            program.build(), jit=False, place=placer(mesh, SPECS["both"]), steps=program.STEPS
        )
        same(result, expected["rigl"])


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_masks_have_the_sharding_of_their_parameters(axis_type, jit):
    mesh = mesh_of(8, axis_type)
    place = placer(mesh, SPECS["both"])
    with jax.set_mesh(mesh):
        tx = program.build()
        params = place(program.some_params())
        state = (jax.jit(tx.init) if jit and axis_type == AxisType.Explicit else tx.init)(params)
        for p, m in zip(jax.tree.leaves(params), jax.tree.leaves(state.masks), strict=True):
            assert m.sharding.is_equivalent_to(p.sharding, p.ndim), (m.sharding, p.sharding)


def test_one_leaf_sharded_differently_from_another(expected):
    mesh = mesh_of(8, AxisType.Auto)
    place = placer(mesh, (PartitionSpec("x", "y"), PartitionSpec()))
    same(program.run(program.build(), place=place), expected["rigl"])


def test_what_was_free_to_move_stays_free_to_move():
    """Uncommitted params, a state made from them, and a batch spread over eight devices.

    Plain Optax runs this: nothing but the batch is tied to a device. A mask committed to the
    first device makes it raise (and makes every first step compile twice).
    """
    params = jax.tree.map(jnp.asarray, program.some_params())
    assert not any(p.committed for p in jax.tree.leaves(params))
    tx = program.build()
    state = tx.init(params)
    params = rigl_optax.apply_masks(params, state)
    assert not [
        jax.tree_util.keystr(k)
        for k, x in jax.tree_util.tree_flatten_with_path((params, state))[0]
        if x.committed
    ]
    mesh = mesh_of(8, AxisType.Auto)
    batch = jax.device_put(jnp.ones((8, 16)), NamedSharding(mesh, PartitionSpec("x")))

    @jax.jit
    def step(params, state, batch):
        loss = lambda p: jnp.sum((batch @ p["a"]["kernel"]) ** 2)
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    params, state = step(params, state, batch)
    step(params, state, batch)


# ------------------------------------------------------------------------------------------ vmap


@pytest.mark.parametrize("method", METHODS)
def test_vmap_over_mask_seeds(method):
    """An ensemble in one program has the masks of separate runs; `seed` may be traced."""

    def one(seed):
        params, state = program.run(program.build(method, seed), jit=False)
        return params, state.masks, state.rewirings

    together = jax.device_get(jax.jit(jax.vmap(one))(jnp.arange(3)))
    alone = jax.jit(one)
    for seed in range(3):
        apart = jax.device_get(alone(seed))
        jax.tree.map(
            lambda t, a: np.testing.assert_array_equal(t[seed], a),  # noqa: B023
            together[1:],
            apart[1:],
        )
        jax.tree.map(
            lambda t, a: np.testing.assert_allclose(t[seed], a, rtol=1e-6),  # noqa: B023
            together[0],
            apart[0],
        )
    masks = together[1]["a"]["kernel"]
    assert (masks[0] != masks[1]).any()


def test_vmap_over_models():
    """Different weights, one mask seed."""
    tx = program.build()
    scales = jnp.asarray([1.0, -0.5, 2.0])

    def one(scale):
        params = jax.tree.map(lambda p: jnp.asarray(p) * scale, program.some_params())
        state = tx.init(params)
        for i in range(5):
            grads = jax.tree.map(lambda g, p: jnp.asarray(g) * scale, program.some_grads(i), params)
            updates, state = tx.update(grads, state, params)
            params = optax.apply_updates(params, updates)
        return state.masks

    together = jax.device_get(jax.jit(jax.vmap(one))(scales))
    for i, scale in enumerate(scales):
        apart = jax.device_get(jax.jit(one)(scale))
        jax.tree.map(lambda t, a: np.testing.assert_array_equal(t[i], a), together, apart)  # noqa: B023
