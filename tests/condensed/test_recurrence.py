"""Recurrent scans with condensed kernels against the dense scans with the same, masked."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rigl_optax import Block, condensed
from rigl_optax.condensed import BlockSparse
from rigl_optax.models import recurrence

TIME, LANES, UNITS = 5, 4, 12
SCANS = {"gru": (condensed.gru, recurrence.gru), "lstm": (condensed.lstm, recurrence.lstm)}
GATES = {"gru": 3, "lstm": 4}
# Blocks and columns of the kernels, in gates: one for each gate, all fused, and a mixture with
# blocks that reach from one gate into the next.
LAYOUTS = {
    "separate": lambda gates: [(Block(4, 3), 1)] * gates,
    "fused": lambda gates: [(Block(3, 4, pool_by="l2"), gates)],
    "mixed": lambda gates: [
        (Block(5, 8, pad=True), 2),
        *[(Block(4, 4, pool_by="max"), 1)] * (gates - 2),
    ],
}
CASES = [("gru", "separate"), ("gru", "mixed"), ("lstm", "fused"), ("lstm", "mixed")]


def array(seed, *shape, dtype=np.float64):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def setting(cell, layout="separate", dtype=np.float64):
    """Values, topologies and probes of the kernels; activations, first state, and what is kept."""
    topologies = tuple(
        condensed.random_topology((UNITS, n * UNITS), 0.5, block, seed=i)
        for i, (block, n) in enumerate(LAYOUTS[layout](GATES[cell]))
    )
    values = tuple(
        jax.jit(condensed.random_values, static_argnums=2)(jax.random.key(i), t, dtype)
        for i, t in enumerate(topologies)
    )
    x = tuple(array(i, TIME, LANES, UNITS, dtype=dtype) for i in range(GATES[cell]))
    first = array(9, LANES, UNITS * (GATES[cell] - 2), dtype=dtype)
    # Lane 1 begins anew in the middle, lane 2 at once.
    keep = jnp.ones((TIME, LANES, 1), dtype).at[3, 1].set(0).at[0, 2].set(0)
    return values, topologies, x, first, keep


def probes_of(topologies):
    return tuple(jnp.zeros(t.grid, jnp.float32) for t in topologies)


def loss_of(scan, kernels, x, first, keep):
    out, last = scan(x, first, kernels, keep)
    cs = array(20, *out.shape, dtype=out.dtype), array(21, *last.shape, dtype=last.dtype)
    return jnp.sum(out * cs[0]) + jnp.sum(last * cs[1]), (out, last)


def condensed_loss(cell, topologies, values, probes, x, first, keep):
    kernels = tuple(map(BlockSparse, values, topologies, probes))
    return loss_of(SCANS[cell][0], kernels, x, first, keep)


def dense_loss(cell, kernels, x, first, keep):
    """Kernels that are side by side are taken apart: the dense scan has one for each gate."""
    gates = jnp.split(jnp.concatenate(kernels, 1), GATES[cell], axis=1)
    return loss_of(SCANS[cell][1], tuple(gates), x, first, keep)


@pytest.mark.parametrize(("cell", "layout"), CASES)
def test_values_gradients_and_scores_are_those_of_the_masked_scan(cell, layout):
    with jax.enable_x64(True):
        values, topologies, x, first, keep = setting(cell, layout)
        step = jax.value_and_grad(
            functools.partial(condensed_loss, cell, topologies), (0, 1, 2, 3), has_aux=True
        )
        (_, got), (dvalues, scores, *d_inputs) = jax.jit(step)(
            values, probes_of(topologies), x, first, keep
        )
        dense = tuple(BlockSparse(v, t).dense() for v, t in zip(values, topologies, strict=True))
        assert any((k == 0).any() for k in dense)
        dense_step = jax.value_and_grad(
            functools.partial(dense_loss, cell), (0, 1, 2), has_aux=True
        )
        (_, wanted), (d_dense, *d_wanted) = jax.jit(dense_step)(dense, x, first, keep)
        found, expected = (jax.tree.leaves(tree) for tree in ((got, d_inputs), (wanted, d_wanted)))
        for a, b in zip(found, expected, strict=True):
            assert a.dtype == np.float64
            np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-12)
        for topology, dvalue, score, gradient in zip(
            topologies, dvalues, scores, d_dense, strict=True
        ):
            masked = jnp.where(topology.dense_mask(), gradient, 0)
            np.testing.assert_allclose(
                BlockSparse(dvalue, topology).dense(), masked, rtol=1e-11, atol=1e-12
            )
            # Scores are float32 in the end: of the gradient of all steps together.
            np.testing.assert_allclose(score, topology.block.pool(gradient), rtol=2e-6)


@pytest.mark.parametrize("cell", SCANS)
def test_vmap_and_checkpoint(cell):
    values, topologies, x, first, keep = setting(cell, "fused", np.float32)
    probes = probes_of(topologies)

    def gradient(values, probes, x, first):
        loss = lambda *args: condensed_loss(cell, topologies, *args, keep)[0]
        return jax.grad(loss, (0, 1, 2, 3))(values, probes, x, first)

    alone = jax.jit(gradient)
    many = jax.tree.map(lambda a: jnp.stack([a, -0.5 * a, 2 * a]), (values, probes, x, first))
    got = jax.jit(jax.vmap(gradient))(*many)
    for i in range(3):
        wanted = alone(*jax.tree.map(lambda a, i=i: a[i], many))
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_allclose(a[i], b, rtol=1e-4, atol=1e-5)

    def again(values, probes, x, first):
        loss = lambda *args: condensed_loss(cell, topologies, *args, keep)[0]
        return jax.grad(jax.checkpoint(loss), (0, 1, 2, 3))(values, probes, x, first)

    recomputed = jax.jit(again)(values, probes, x, first)
    wanted = alone(values, probes, x, first)
    for a, b in zip(jax.tree.leaves(recomputed), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("cell", SCANS)
def test_bfloat16_is_near_float32(cell):
    """Weights in float32 too: the state says in which dtype all is computed."""
    values, topologies, x, first, keep = setting(cell, "separate", np.float32)
    step = jax.jit(
        jax.value_and_grad(
            functools.partial(condensed_loss, cell, topologies), (0, 1, 2, 3), has_aux=True
        )
    )
    arguments = values, probes_of(topologies), x, first, keep
    (_, wanted), gradients = step(*arguments)
    x, first, keep = jax.tree.map(lambda a: a.astype(jnp.bfloat16), (x, first, keep))
    (_, got), found = step(values, probes_of(topologies), x, first, keep)
    assert {a.dtype for a in jax.tree.leaves(got)} == {np.dtype(jnp.bfloat16)}
    assert {a.dtype for a in jax.tree.leaves(found[:2])} == {np.dtype(np.float32)}
    for a, b in zip(
        jax.tree.leaves((got, found)), jax.tree.leaves((wanted, gradients)), strict=True
    ):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        assert np.abs(a - b).max() < 0.05 * np.abs(b).max()


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_lowers_for_accelerators(platform):
    """Lowered, not run: there is no such device here. A batched product, no loop over blocks."""
    values, topologies, x, first, keep = setting("lstm", "fused", np.float32)
    step = jax.jit(
        jax.grad(functools.partial(condensed_loss, "lstm", topologies), (0, 1, 2), has_aux=True)
    )
    exported = jax.export.export(step, platforms=[platform])
    text = exported(values, probes_of(topologies), x, first, keep).mlir_module()
    assert "batching_dims = [0] x [0]" in text


@pytest.mark.parametrize(
    ("gates", "widths", "told"),
    [
        (4, (3,), "x has 4 gates: must be 3"),
        (3, (1, 1), r"\[\(12, 12\), \(12, 12\)\]: must be 3 of \(12, 12\), or fewer of several"),
        (3, (1.5, 1.5), r"\[\(12, 18\), \(12, 18\)\]"),
    ],
)
def test_what_does_not_fit_is_refused(gates, widths, told):
    topologies = [
        condensed.random_topology((UNITS, int(n * UNITS)), 0.5, Block(2, 2)) for n in widths
    ]
    kernels = tuple(BlockSparse(jnp.zeros(t.values_shape), t) for t in topologies)
    _, _, x, first, keep = setting("gru", dtype=np.float32)
    with pytest.raises(ValueError, match=told):
        condensed.gru((x * 2)[:gates], first, kernels, keep)
