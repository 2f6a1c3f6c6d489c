"""The scan of a GRU with condensed recurrent kernels, with its gradients written out.

A kernel that is used at every step gets one gradient of all steps, by one product after the
backward scan; and so do its scores: the score of the sum, not a sum of scores.
"""

import functools
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from rigl_optax.condensed import _product
from rigl_optax.condensed._kernel import BlockSparse, Spec, blocked, flat

Arrays: TypeAlias = tuple[jax.Array, ...]  # one of each gate
Kernels: TypeAlias = tuple[BlockSparse, BlockSparse, BlockSparse]


def gru(
    x: Arrays, h_BxU: jax.Array, kernels: Kernels, keep_TxBx1: jax.Array
) -> tuple[jax.Array, jax.Array]:
    r"""States of a GRU after each step; the one of Flax and cuDNN.

    .. math::
        r &= \sigma(x_r + h U_r), \qquad u = \sigma(x_u + h U_u) \\
        n &= \tanh(x_n + r \odot (h U_n)), \qquad h \leftarrow (1 - u) \odot n + u \odot h

    Args:
      x: Of the gates reset, update, candidate: what comes from below, (time, lanes, units) each.
      h_BxU: The state before the first step.
      kernels: Of the same gates, from the state, (units, units) each, condensed.
      keep_TxBx1: 0 where the state is forgotten before the step, else 1. Has no gradient.

    Returns:
      The states (time, lanes, units), and the last of them again.

    Raises:
      ValueError: If a kernel is not of (units, units).
    """
    units = h_BxU.shape[-1]
    for kernel in kernels:
        if kernel.shape != (units, units):
            raise ValueError(f"a kernel of shape {kernel.shape} for {units} units")
    specs = tuple(Spec(k.topology.block, k.topology.shape) for k in kernels)
    places = tuple((k.topology.rows, k.topology.cols) for k in kernels)
    # Features first, as blocks are multiplied.
    out_TxUxB, last_UxB = _gru(
        specs,
        places,
        tuple(k.values for k in kernels),
        tuple(k.probe for k in kernels),
        tuple(gate.swapaxes(1, 2) for gate in x),
        h_BxU.T,
        keep_TxBx1.swapaxes(1, 2),
    )
    return out_TxUxB.swapaxes(1, 2), last_UxB.T


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gru(specs: Any, *arguments: Any) -> tuple[jax.Array, jax.Array]:
    return _forward(specs, *arguments)[0]


def _forward(
    specs: tuple[Spec, ...],
    places: Any,
    values: Arrays,
    probes: Any,
    x: Arrays,
    h_UxB: jax.Array,
    keep_Tx1xB: jax.Array,
) -> tuple[tuple[jax.Array, jax.Array], Any]:
    def back(h_UxB: jax.Array, gate: int) -> jax.Array:
        spec, (rows, cols) = specs[gate], places[gate]
        parts = blocked(h_UxB, spec.grid[0], spec.block.rows)
        y = _product.forward(values[gate], rows, cols, parts, spec.grid[1])
        return flat(y, spec.shape[-1]).astype(h_UxB.dtype)

    def step(h_UxB: jax.Array, now: tuple[Arrays, jax.Array]) -> tuple[jax.Array, Arrays]:
        (x_r, x_u, x_n), keep_1xB = now
        h_UxB = h_UxB * keep_1xB
        back_n = back(h_UxB, 2)
        r, u = jax.nn.sigmoid(x_r + back(h_UxB, 0)), jax.nn.sigmoid(x_u + back(h_UxB, 1))
        n = jnp.tanh(x_n + r * back_n)
        new_UxB = (1 - u) * n + u * h_UxB
        return new_UxB, (new_UxB, r, u, n, back_n)

    last_UxB, kept = jax.lax.scan(step, h_UxB, (x, keep_Tx1xB))
    return (kept[0], last_UxB), (kept, places, values, probes, h_UxB, keep_Tx1xB)


def _backward(specs: tuple[Spec, ...], saved: Any, gradients: Any) -> tuple[Any, ...]:
    (out_TxUxB, *gates), places, values, probes, first_UxB, keep_Tx1xB = saved
    before_TxUxB = jnp.concatenate([first_UxB[None], out_TxUxB[:-1]]) * keep_Tx1xB

    def through(d_UxB: jax.Array, gate: int) -> jax.Array:
        spec, (rows, cols) = specs[gate], places[gate]
        parts = blocked(d_UxB, spec.grid[1], spec.block.cols)
        dh = _product.backward_input(values[gate], rows, cols, parts, spec.grid[0])
        return flat(dh, spec.shape[-2]).astype(d_UxB.dtype)

    def step(dh_UxB: jax.Array, now: tuple[jax.Array, ...]) -> tuple[jax.Array, Arrays]:
        dout_UxB, h_UxB, keep_1xB, r, u, n, back_n = now
        dh_UxB = dh_UxB + dout_UxB
        du = dh_UxB * (h_UxB - n) * u * (1 - u)
        dn = dh_UxB * (1 - u) * (1 - n * n)
        dr = dn * back_n * r * (1 - r)
        dback = (dr, du, dn * r)
        below = through(dback[0], 0) + through(dback[1], 1) + through(dback[2], 2)
        return (dh_UxB * u + below) * keep_1xB, (*dback, dn)

    dout_TxUxB, dlast_UxB = gradients
    now = (dout_TxUxB, before_TxUxB, keep_Tx1xB, *gates)
    dfirst_UxB, (dr, du, dback_n, dn) = jax.lax.scan(step, dlast_UxB, now, reverse=True)
    before_UxTB = _all_steps(before_TxUxB)
    dvalues, dprobes = [], []
    for gate, d_TxUxB in enumerate((dr, du, dback_n)):
        spec, (rows, cols) = specs[gate], places[gate]
        block, (inputs, outputs) = spec.block, spec.grid
        below = blocked(before_UxTB, inputs, block.rows)
        above = blocked(_all_steps(d_TxUxB), outputs, block.cols)
        products = _product.backward_values(rows, cols, below, above, (block.rows, block.cols))
        dvalues.append(products.astype(values[gate].dtype))
        probe = probes[gate]
        dprobes.append(None if probe is None else spec.scores(below, above).astype(probe.dtype))
    return None, tuple(dvalues), tuple(dprobes), (dr, du, dn), dfirst_UxB, None


_gru.defvjp(_forward, _backward)


def _all_steps(x_TxUxB: jax.Array) -> jax.Array:
    """[units, time * lanes]."""
    return jnp.moveaxis(x_TxUxB, 0, 1).reshape(x_TxUxB.shape[1], -1)
