"""What a step does with masks in memory: bits, and no copy where nothing changes."""

import re

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import rigl_optax
from rigl_optax._xla import _bits

SHAPES = st.lists(st.integers(0, 19), min_size=0, max_size=4)


@hypothesis.settings(deadline=None, max_examples=40)
@hypothesis.given(SHAPES, st.integers(0, 2**32 - 1))
def test_packing_loses_nothing(shape, seed):
    mask = np.random.default_rng(seed).random(shape) < 0.5
    packed = jax.jit(_bits.pack)(mask)
    assert packed.shape == _bits.shape_of(mask.shape)
    assert packed.dtype == jnp.uint8
    np.testing.assert_array_equal(jax.jit(_bits.unpack, static_argnums=1)(packed, mask.shape), mask)
    # Restated: along the axis before the last, the first entry is the lowest bit.
    axis = max(mask.ndim - 2, 0)
    rows = mask.reshape(mask.shape or (1,))
    np.testing.assert_array_equal(packed, np.packbits(rows, axis, bitorder="little"))


@pytest.mark.parametrize("inner", [optax.sgd(0.1, momentum=0.9), optax.adam(1e-3)])
def test_an_ordinary_step_copies_no_mask(inner, monkeypatch):
    # 25.5 MB and 6,229 page faults at every step of a ResNet-50, before.
    monkeypatch.setattr(jax, "device_count", lambda *_: 1)  # else leaves may be sharded
    params = {"a": jnp.ones((40, 64)), "b": jnp.ones((3, 3, 8, 32))}
    tx = rigl_optax.rigl(inner, 0.9, end=1000)

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, params).compile()
    computations = re.split(r"\n(?=\S)", compiled.as_text())
    entry = next(c for c in computations if c.startswith("ENTRY"))
    ordinary = re.search(r"branch_computations=\{%([\w.]+),", entry)
    assert ordinary is not None
    stay = next(c for c in computations if c.startswith(f"%{ordinary[1]} "))
    for computation in (entry, stay):
        assert not re.findall(r"= pred\[\d[\d,]*\]\S* (?:copy|fusion)\(", computation)


@pytest.mark.parametrize("inner", [optax.sgd(0.1, momentum=0.9), optax.adam(1e-2)])
def test_packed_or_apart_every_bit_of_a_run_is_the_same(inner, monkeypatch):
    """Packed leaves learn the old masks from what changed; those apart are kept as they are."""
    rng = np.random.default_rng(0)
    shapes = {"a": (13, 7), "b": (3, 3, 5, 9), "c": (41, 8)}
    start = {k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in shapes.items()}
    gradients = [
        {k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in shapes.items()}
        for _ in range(9)
    ]
    gradients[4]["a"] = gradients[4]["a"].at[0, 0].set(jnp.nan)  # a rewiring that fails

    def run(devices):
        monkeypatch.setattr(jax, "device_count", lambda *_: devices)
        tx = rigl_optax.rigl(inner, 0.7, end=1000, every=2)
        params, state = start, tx.init(start)  # dense: grown weights have to be healed
        for number, gradient in enumerate(gradients):
            if number == 5:
                params = start
            updates, state = tx.update(gradient, state, params)
            params = optax.apply_updates(params, updates)
        assert int(state.rewirings) == 4
        assert int(state.healed) > 0
        return params, state

    for packed, apart in zip(*(jax.tree.leaves(run(n)) for n in (1, 8)), strict=True):
        assert np.asarray(packed).tobytes() == np.asarray(apart).tobytes()
