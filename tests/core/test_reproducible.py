"""Nothing but the seed decides: not the process, the hash seed, PRNG flags, or a restart."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import rigl_optax
from tests.core import sharded_program as program

ROOT = Path(__file__).parents[2]
METHODS = ["rigl", "sparse_evolutionary_training"]


def start(method, *settings, hash_seed="0"):
    return subprocess.Popen(
        [sys.executable, "-m", "tests.core.sharded_program", method, *settings],
        cwd=ROOT,
        env=os.environ
        | {"PYTHONHASHSEED": hash_seed, "JAX_PLATFORMS": "cpu"}
        | {"JAX_ENABLE_COMPILATION_CACHE": "false"},  # each compiles by itself
        stdout=subprocess.PIPE,
        text=True,
    )


def result(process):
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0
    return json.loads(out)


def test_two_processes_with_different_hash_seeds_agree():
    one = start("sparse_evolutionary_training", hash_seed="1")
    two = start("sparse_evolutionary_training", "jax_num_cpu_devices=" + "2", hash_seed="2")
    one, two = result(one), result(two)
    assert one["hash"] != two["hash"], "the hash seeds had no effect"
    assert one["masks"] == two["masks"]
    assert one["params"] == two["params"]
    params, state = program.run(program.build("sparse_evolutionary_training"))
    assert one["masks"] == program.digest(state.masks)
    assert one["params"] == program.digest(params)


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("jax_threefry_partitionable", False),
        ("jax_default_prng_impl", "rbg"),
        ("jax_default_prng_impl", "unsafe_rbg"),
        ("jax_enable_x64", True),
    ],
)
@pytest.mark.parametrize("method", METHODS)
def test_flags_do_not_change_masks(flag, value, method):
    expected = jax.device_get(program.run(program.build(method))[1].masks)
    old = getattr(jax.config, flag)
    jax.config.update(flag, value)
    try:
        masks = jax.device_get(program.run(program.build(method))[1].masks)
    finally:
        jax.config.update(flag, old)
    jax.tree.map(np.testing.assert_array_equal, masks, expected)


def test_custom_prng_keys_flag():
    expected = program.build().init(program.some_params()).masks
    with jax.debug_key_reuse(True):
        masks = program.build().init(program.some_params()).masks
    jax.tree.map(np.testing.assert_array_equal, masks, expected)


@pytest.mark.parametrize("method", METHODS)
def test_seeds_differ_and_repeat(method):
    draw = lambda seed: np.asarray(
        program.build(method, seed).init(program.some_params()).masks["a"]["kernel"]
    )
    np.testing.assert_array_equal(draw(5), draw(5))
    assert (draw(5) != draw(6)).any()
    assert np.count_nonzero(draw(5)) == np.count_nonzero(draw(6))


def test_methods_start_from_the_same_masks():
    """Comparisons at equal seeds start from equal networks."""
    params = program.some_params()
    masks = [program.build(m).init(params).masks for m in METHODS]
    static = rigl_optax.static_sparse(optax.sgd(0.1), rigl_optax.uniform(0.75), seed=3)
    masks.append(static.init(params).masks)
    for other in masks[1:]:
        jax.tree.map(np.testing.assert_array_equal, masks[0], other)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("stop", range(1, program.STEPS), ids=lambda s: f"after{s}")
def test_a_restart_from_numpy_is_bit_identical(method, stop):
    """Stopped before, at and after rewirings; saved as NumPy; loaded into a new object."""
    params, state, expected = straight(method)[stop]
    loaded = jax.tree.map(lambda x: np.array(x), (params, state))
    params, state = jax.tree.map(jnp.asarray, loaded)
    update = jax.jit(program.build(method).update)
    for i in range(stop, program.STEPS):
        updates, state = update(program.some_grads(i), state, params)
        params = optax.apply_updates(params, updates)
    jax.tree.map(np.testing.assert_array_equal, (params, state), expected)


CACHE = {}


def straight(method):
    """{step: (params, state, final)} of one uninterrupted run."""
    if method not in CACHE:
        tx = program.build(method)
        params = jax.tree.map(jnp.asarray, program.some_params())
        state = tx.init(params)
        params = rigl_optax.apply_masks(params, state)
        update = jax.jit(tx.update)
        at = {}
        for i in range(program.STEPS):
            at[i] = (params, state)
            updates, state = update(program.some_grads(i), state, params)
            params = optax.apply_updates(params, updates)
        CACHE[method] = {i: (*v, (params, state)) for i, v in at.items()}
    return CACHE[method]


def test_growth_is_not_the_draw_of_the_initial_mask():
    """Without a purpose in the key, random growth at count 0 repeats the mask: nothing grows."""
    params = {"kernel": jnp.ones((40, 40))}
    tx = rigl_optax.sparse_evolutionary_training(
        optax.sgd(0.1),
        rigl_optax.uniform(0.5),
        end=2,
        every=1,
        drop_fraction=rigl_optax.constant_drop_fraction(0.5),
    )
    state = tx.init(params)
    before = np.asarray(state.masks["kernel"])
    _, state = tx.update(params, state, rigl_optax.apply_masks(params, state))
    after = np.asarray(state.masks["kernel"])
    moved = np.count_nonzero(after & ~before)
    # 400 grow among 1200 free, of which 800 were inactive: 267 expected.
    assert 200 < moved < 330
    # A second rewiring from the same masks draws afresh.
    _, again = tx.update(
        params,
        state._replace(masks={"kernel": jnp.asarray(before)}),
        rigl_optax.apply_masks(params, state),
    )
    assert (np.asarray(again.masks["kernel"]) != after).any()
