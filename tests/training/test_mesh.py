import dataclasses
import functools
import math
import re

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

import rigl_optax
from rigl_optax.data import batches
from rigl_optax.training import config as config_lib
from rigl_optax.training import mesh, setup, step

needs_eight = pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
AXES = ["auto", "explicit"]


@hypothesis.given(st.lists(st.integers(0, 12), max_size=4), st.integers(1, 8))
def test_the_largest_axis_that_divides_is_cut(shape, ways):
    spec = mesh.partition(tuple(shape), ways)
    can = [size for size in shape if size and size % ways == 0]
    if ways == 1 or not can:
        assert spec == PartitionSpec()
    else:
        assert len(spec) == len(shape) and spec.count(mesh.PARAMS) == 1
        assert shape[spec.index(mesh.PARAMS)] == max(can)


def test_what_there_are_no_devices_for_is_refused(small):
    def placement(**keys):
        return mesh.placement(config_lib.changed(small, keys))

    everything = jax.device_count()
    assert placement(**{"mesh.data": 0}).mesh.size == everything
    for keys in ({"mesh.data": 99}, {"mesh.data": 0, "mesh.params": 3}, {"mesh.params": 99}):
        with pytest.raises(ValueError, match=f"devices, but there are {everything} on 1 process"):
            placement(**keys)
        here = mesh.fitting(config_lib.changed(small, keys))
        assert (here.mesh.data, here.mesh.params) == (1, 1)
    assert mesh.fitting(small) is small
    with pytest.raises(ValueError, match="mesh.axes='manual': must be one of auto, explicit"):
        placement(**{"mesh.axes": "manual"})


@needs_eight
def test_a_batch_that_cannot_be_spread_is_refused(small):
    placement = mesh.placement(config_lib.changed(small, {"mesh.data": 2, "mesh.params": 4}))
    with pytest.raises(ValueError, match=r"batch_size=50: must be a multiple of 8.*2 for data x 4"):
        placement.rows(50)
    assert placement.rows(48).tolist() == list(range(48)) and placement.padded(50) == 56


def test_the_parts_of_hosts_make_up_the_whole_batch():
    split = batches.Split(np.arange(40, dtype=np.uint8).reshape(20, 2), np.arange(20))
    parts = [np.array([0, 1, 5]), np.array([2, 3, 4])]  # devices need not lie in order
    whole = batches.training_batch(split, 6, seed=3, step=1)
    for part in parts:
        found = batches.training_batch(split, 6, seed=3, step=1, rows=part)
        for name, values in found.items():
            np.testing.assert_array_equal(values, whole[name][part])
    wholes = list(batches.evaluation_batches(split, 6))
    for part in parts:
        founds = list(batches.evaluation_batches(split, 6, part))
        assert len(founds) == len(wholes) == 4
        for found, all_ in zip(founds, wholes, strict=True):
            for name in all_:
                np.testing.assert_array_equal(found[name], all_[name][part])


def captured(monkeypatch, config):
    """A run, and the function that makes its initial state."""
    made = []
    maker = mesh.Placement.maker

    def capturing(self, initial):
        made.append(initial)
        return maker(self, initial)

    monkeypatch.setattr(mesh.Placement, "maker", capturing)
    run = setup.prepare(config)
    assert run.initial is run.initial
    return run, made[0]


@needs_eight
@pytest.mark.parametrize("axes", AXES)
def test_a_state_is_made_in_parts_and_equals_the_one_made_whole(small, monkeypatch, axes):
    wide = config_lib.changed(small, {"model.hidden": (320, 24)})
    config = config_lib.changed(wide, {"mesh.params": 8, "mesh.axes": axes})
    run, initial = captured(monkeypatch, config)
    for a, b in zip(
        jax.tree.leaves(run.initial), jax.tree.leaves(setup.prepare(wide).initial), strict=True
    ):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    kernels = [
        tree["layers"][0]["kernel"]
        for tree in (
            run.initial.params,
            run.initial.opt_state.masks,
            optax.tree.get(run.initial.opt_state, "trace"),
            run.initial.history.explored,
        )
    ]
    for kernel in kernels:
        assert kernel.shape == (64, 320) and kernel.sharding.mesh == run.placement.mesh
        assert {shard.data.shape for shard in kernel.addressable_shards} == {(64, 40)}
    if axes == "auto":
        compiled = jax.jit(initial, out_shardings=run.placement.of(run.initial)).lower().compile()
        largest = max(
            math.prod(int(n) for n in dims.split(","))
            for dims in re.findall(r"[a-z]\d*\[([\d,]+)\]", compiled.as_text())
        )
        assert 64 * 40 <= largest < 64 * 320


def step_and_batch(config):
    """A run, its compiled step, a batch, and a list that grows when the step is traced."""
    prepared, traced = setup.prepare(config), []

    def update(*args, **extra):
        traced.append(args)
        return prepared.tx.update(*args, **extra)

    tx = optax.GradientTransformationExtraArgs(prepared.tx.init, update)
    run = dataclasses.replace(prepared, tx=tx)
    train_step = step.make_train_step(run)
    rows = run.placement.rows(config.batch_size)
    batch = run.placement.put(
        batches.training_batch(run.dataset.train, config.batch_size, seed=0, step=0, rows=rows)
    )
    return run, train_step, batch, traced


@needs_eight
@pytest.mark.parametrize("axes", AXES)
def test_a_step_compiles_once_and_keeps_every_leaf_in_its_place(small, axes):
    config = config_lib.changed(
        small, {"batch_size": 48, "mesh.data": 2, "mesh.params": 4, "mesh.axes": axes}
    )
    run, train_step, batch, traced = step_and_batch(config)
    state = jax.tree.map(jnp.copy, run.initial._replace(history=None))
    for _ in range(3):
        state = train_step(state, batch)
    assert len(traced) == 1
    for leaf, wanted in zip(
        jax.tree.leaves(state), jax.tree.leaves(run.placement.of(state)), strict=True
    ):
        assert leaf.sharding.is_equivalent_to(wanted, leaf.ndim)


# -------------------------------------------------------------------- other kinds of devices


@needs_eight
@pytest.mark.parametrize("axes", AXES)
def test_a_sharded_train_step_lowers_for_tpu_and_cuda(small, axes):
    config = config_lib.changed(
        small, {"batch_size": 48, "mesh.data": 2, "mesh.params": 4, "mesh.axes": axes}
    )
    run, train_step, batch, _ = step_and_batch(config)
    state = run.initial._replace(history=None)
    exported = jax.export.export(train_step.__wrapped__, platforms=["tpu", "cuda"])(state, batch)
    assert exported.platforms == ("tpu", "cuda") and exported.nr_devices == 8
    assert "params" in exported.mlir_module()


def test_a_plain_update_lowers_for_tpu_and_cuda():
    params = {"kernel": jnp.ones((16, 24)), "bias": jnp.ones(24)}
    tx = rigl_optax.rigl(optax.adam(0.1), 0.75, end=6, every=2)
    exported = jax.export.export(jax.jit(tx.update), platforms=["tpu", "cuda"])(
        params, tx.init(params), params
    )
    assert exported.platforms == ("tpu", "cuda")


@pytest.fixture(scope="module")
def after(vision):
    """Masks and values after three steps on a mesh."""

    @functools.cache
    def found(**mesh):
        config = config_lib.changed(
            vision, {"batch_size": 16, "optimizer.learning_rate": 1e-3, "method.every": 2, **mesh}
        )
        run = setup.prepare(config)
        take = step.make_train_step(run)
        state = jax.tree.map(lambda x: x.copy(), run.initial)._replace(history=None)
        rows = run.placement.rows(16)
        for i in range(3):
            state = take(state, run.placement.put(run.task.training_batch(config, i, rows)))
        masks = rigl_optax.get_masks(state.opt_state)
        return jax.device_get((masks, (state.params, state.model_state, state.sums.loss)))

    return found


@pytest.mark.slow
@needs_eight
@pytest.mark.parametrize("axes", AXES)
def test_the_same_network_on_a_mesh(after, axes):
    """Batch statistics are those of the whole batch, wherever its parts are."""
    masks, values = after()
    other_masks, other = after(**{"mesh.data": 2, "mesh.params": 2, "mesh.axes": axes})
    for mine, theirs in zip(*map(jax.tree.leaves, (masks, other_masks)), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    for mine, theirs in zip(*map(jax.tree.leaves, (values, other)), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-3, atol=1e-4)
