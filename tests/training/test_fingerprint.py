import dataclasses
import io

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from rigl_optax.training import config as config_lib
from rigl_optax.training import fingerprint, loop, mesh, setup, step

pytestmark = pytest.mark.usefixtures("shared_programs")

needs_eight = pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")


def by_hand(x):
    """The definition, in Python's integers."""

    def mixed(word):
        word = (word ^ (word >> 16)) * 0x85EBCA6B % 2**32
        word = (word ^ (word >> 13)) * 0xC2B2AE35 % 2**32
        return word ^ (word >> 16)

    words = [int(v) % 2**32 for v in np.ravel(x)]
    return sum(mixed((mixed(i) + word) % 2**32) for i, word in enumerate(words)) % 2**32


def placed(small, x, **keys):
    placement = mesh.placement(config_lib.changed(small, keys))
    leaves = [jax.device_put(leaf, placement.of(leaf)) for leaf in x]
    return placement, leaves


def compared(placement, leaves):
    found = placement.compile(lambda xs: fingerprint.table(xs, placement))(leaves)
    cut = {str(i): fingerprint.axis_of(placement, x) is not None for i, x in enumerate(leaves)}
    return list(fingerprint.agreed(np.asarray(found), cut, placement).values())


whole = jax.jit(lambda x: fingerprint.fingerprint(x, x.shape))


@hypothesis.given(st.integers(0, 2**32 - 1))
@hypothesis.settings(max_examples=20)
def test_it_is_what_it_says(seed):
    x = np.random.default_rng(seed).random((3, 5, 4)) < 0.5
    assert int(whole(x)) == by_hand(x)


def test_integers_and_scalars():
    x = np.array([3, -1, 2**31 - 1], np.int32)
    assert int(whole(x)) == by_hand(x)
    assert int(whole(jnp.int32(7))) == by_hand(7) != by_hand(8)


def test_every_single_change_is_seen_and_so_is_every_swap():
    x = np.random.default_rng(0).random((8, 6)) < 0.3
    seen = {int(whole(x))}
    for i in range(x.size):
        changed = x.copy()
        changed.flat[i] ^= True
        seen.add(int(whole(changed)))
    on, off = np.flatnonzero(x), np.flatnonzero(~x)
    for i in on:
        swapped = x.copy()
        swapped.flat[[i, off[0]]] = False, True
        seen.add(int(whole(swapped)))
    assert len(seen) == 1 + x.size + len(on)


@needs_eight
@pytest.mark.parametrize("axes", ["auto", "explicit"])
@pytest.mark.parametrize(("data", "params"), [(1, 1), (8, 1), (2, 4), (1, 8)])
def test_it_does_not_depend_on_the_mesh(small, data, params, axes):
    rng = np.random.default_rng(1)
    x = [np.int32(17), *(rng.random(s) < 0.4 for s in [(7,), (16, 5), (3, 3, 4, 24)])]
    placement, leaves = placed(
        small, x, **{"mesh.data": data, "mesh.params": params, "mesh.axes": axes}
    )
    assert compared(placement, leaves) == [by_hand(leaf) for leaf in x]


def with_a_flip(leaf, device):
    """The same array, but one device holds something else."""
    parts = []
    for shard in leaf.addressable_shards:
        part = np.array(shard.data)
        if shard.device == device:
            part.flat[1] ^= True
        parts.append(jax.device_put(part, shard.device))
    return jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, parts)


@needs_eight
@pytest.mark.parametrize("bad", [1, 2])
def test_one_device_that_differs_is_named_with_the_leaf(small, bad):
    # Leaf 1 is whole on all eight devices; leaf 2 is cut in four and each part is there twice.
    x = [np.int32(17), np.ones((7,), bool), np.ones((16, 5), bool)]
    placement, leaves = placed(small, x, **{"mesh.data": 2, "mesh.params": 4})
    culprit = placement.mesh.devices[1, 2]
    leaves[bad] = with_a_flip(leaves[bad], culprit)
    with pytest.raises(fingerprint.DivergenceError, match=f"the mask of '{bad}'") as error:
        compared(placement, leaves)
    told = str(error.value)
    assert f"on device {culprit.id} (process 0)" in told
    agreeing = 7 if bad == 1 else 1
    assert told.count("(process 0)") == agreeing + 1


def spoil_mask(state):
    layer = state.opt_state.masks["layers"][2]
    layer["kernel"] = with_a_flip(layer["kernel"], jax.devices()[1])


def spoil_topology(state):
    topologies = state.opt_state.topologies
    old = topologies["layers/0/kernel"]
    rows = with_a_flip(old.rows, jax.devices()[1])
    topologies["layers/0/kernel"] = dataclasses.replace(old, rows=rows)


@needs_eight
@pytest.mark.parametrize(("at_rewirings", "saved"), [(True, []), (False, ["10"])])
@pytest.mark.parametrize(
    ("keys", "spoil", "culprit"),
    [
        ({}, spoil_mask, "layers/2/kernel"),
        (
            {
                "method.condensed": True,
                "method.structure": {"name": "block", "rows": 4, "cols": 4},
                "model.dense_layers": "layers/[12]",
            },
            spoil_topology,
            "layers/0/kernel/rows",
        ),
    ],
    ids=["masked", "condensed"],
)
def test_a_run_with_a_replica_that_differs_stops(
    small, tmp_path, monkeypatch, at_rewirings, saved, keys, spoil, culprit
):
    # Rewirings are updates 0, 7, 14; checkpoints come after 10 and 20 of them.
    config = config_lib.changed(
        small, {"mesh.data": 2, "steps": 25, "method.every": 7, "checkpoint.every": 10}
    )
    config = config_lib.changed(config, {"faults.compare_at_rewirings": at_rewirings, **keys})
    spoil_at = 3 if at_rewirings else 12
    make_train_step = step.make_train_step

    def make_spoiled(*args, **keys):
        train_step = make_train_step(*args, **keys)

        def spoiled(state, batch):
            at = int(state.step)
            state = train_step(state, batch)
            if at == spoil_at:
                spoil(state)
            return state

        return spoiled

    monkeypatch.setattr(step, "make_train_step", make_spoiled)
    with pytest.raises(fingerprint.DivergenceError, match=f"the mask of '{culprit}'"):
        loop.train(config, tmp_path, Console(file=io.StringIO()))
    assert sorted(p.name for p in (tmp_path / "checkpoints").glob("[0-9]*")) == saved


def test_processes_with_different_configs_are_told_each_key(small, monkeypatch):
    other = config_lib.changed(small, {"seed": 1, "checkpoint.every": 7, "data.dir": "elsewhere"})
    texts = []

    def all_say(text):
        texts.append(text)
        return texts

    monkeypatch.setattr(fingerprint.hosts, "all_say", all_say)
    fingerprint.compare_configs(small)
    with pytest.raises(ValueError, match="must have the same config") as error:
        fingerprint.compare_configs(other)
    told = str(error.value)
    assert "config.checkpoint.every is 20 on process 0 and 7 on 1; config.seed is 0" in told
    assert "data.dir" not in told


@needs_eight
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_weights_of_replicas_are_compared_and_not_returned(small, dtype):
    run = setup.prepare(config_lib.changed(small, {"mesh.data": 2}))
    params = jax.tree.map(lambda x: x.astype(dtype), run.initial.params)
    sound = run.initial._replace(params=params)
    compare = fingerprint.comparer(run)
    assert not any("weights" in path for path in compare(sound))
    kernel = params["layers"][0]["kernel"]
    parts = [np.array(shard.data) for shard in kernel.addressable_shards]
    parts[1][0, 5] = 9
    put = [
        jax.device_put(p, s.device) for p, s in zip(parts, kernel.addressable_shards, strict=True)
    ]
    params["layers"][0]["kernel"] = jax.make_array_from_single_device_arrays(
        kernel.shape, kernel.sharding, put
    )
    told = "the weights of 'layers/0/kernel' are not the same everywhere"
    with pytest.raises(fingerprint.DivergenceError, match=told):
        compare(sound._replace(params=params))


def test_without_masks_the_step_is_compared(small):
    config = config_lib.changed(small, {"method.name": "dense"})
    run = setup.prepare(config)
    assert fingerprint.comparer(run)(run.initial) == {"step": by_hand(0)}
