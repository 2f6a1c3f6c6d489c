"""The scans of a GRU and an LSTM over time, with their gradients written out.

Left to itself, JAX's derivative of a scan adds to the gradient of the recurrent kernel at every
step, which reads and writes a matrix of its size each time. Here the backward scan keeps what
reaches each gate, and the kernel's gradient is one product over all steps after it. Gates are
arrays of their own throughout. `benchmarks/recurrent.py` prints what that gives.

Reverse mode, and forward over reverse (Hessian times vector), work; forward mode alone does not.
"""

from typing import TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx

Arrays: TypeAlias = tuple[jax.Array, ...]  # one of each gate, or what a scan keeps
Gradients: TypeAlias = tuple[Arrays, jax.Array, Arrays, None]
Outcome: TypeAlias = tuple[jax.Array, jax.Array]


@jax.custom_vjp
def gru(x: Arrays, h_BxU: jax.Array, kernels: Arrays, keep_TxBx1: jax.Array) -> Outcome:
    """States of a GRU after each step.

    Args:
      x: Of the gates reset, update, candidate: what comes from below, (time, lanes, units) each.
      h_BxU: The state before the first step.
      kernels: Of the same gates, from the state, (units, units) each.
      keep_TxBx1: 0 where the state is forgotten before the step, else 1. Has no gradient.

    Returns:
      The states (time, lanes, units), and the last of them again.
    """
    return _gru_forward(x, h_BxU, kernels, keep_TxBx1)[0]


def _gru_forward(
    x: Arrays, h_BxU: jax.Array, kernels: Arrays, keep_TxBx1: jax.Array
) -> tuple[Outcome, Arrays]:
    kernel_UxG = jnp.concatenate(kernels, axis=1)

    def step(h_BxU: jax.Array, now: tuple[Arrays, jax.Array]) -> tuple[jax.Array, Arrays]:
        (x_r, x_u, x_n), keep_Bx1 = now
        h_BxU = h_BxU * keep_Bx1
        back_r, back_u, back_n = jnp.split(h_BxU @ kernel_UxG, 3, axis=1)
        r, u = nnx.sigmoid(x_r + back_r), nnx.sigmoid(x_u + back_u)
        n = jnp.tanh(x_n + r * back_n)
        new_BxU = (1 - u) * n + u * h_BxU
        return new_BxU, (new_BxU, r, u, n, back_n)

    last_BxU, (out_TxBxU, *gates) = jax.lax.scan(step, h_BxU, (x, keep_TxBx1))
    return (out_TxBxU, last_BxU), (out_TxBxU, *gates)


def _gru_saved(
    x: Arrays, h_BxU: jax.Array, kernels: Arrays, keep_TxBx1: jax.Array
) -> tuple[Outcome, tuple[Arrays, jax.Array, Arrays, jax.Array]]:
    outcome, kept = _gru_forward(x, h_BxU, kernels, keep_TxBx1)
    return outcome, (kept, h_BxU, kernels, keep_TxBx1)


def _gru_backward(
    saved: tuple[Arrays, jax.Array, Arrays, jax.Array], gradients: Outcome
) -> Gradients:
    (out_TxBxU, *gates), first_BxU, kernels, keep_TxBx1 = saved
    before_TxBxU = _before(first_BxU, out_TxBxU, keep_TxBx1)
    transposed = tuple(kernel.T for kernel in kernels)

    def step(dh_BxU: jax.Array, now: tuple[jax.Array, ...]) -> tuple[jax.Array, Arrays]:
        dout_BxU, h_BxU, keep_Bx1, r, u, n, back_n = now
        dh_BxU = dh_BxU + dout_BxU
        du = dh_BxU * (h_BxU - n) * u * (1 - u)
        dn = dh_BxU * (1 - u) * (1 - n * n)
        dr = dn * back_n * r * (1 - r)
        dback = (dr, du, dn * r)
        return (dh_BxU * u + _sum_of_products(dback, transposed)) * keep_Bx1, (*dback, dn)

    dout_TxBxU, dlast_BxU = gradients
    now = (dout_TxBxU, before_TxBxU, keep_TxBx1, *gates)
    dfirst_BxU, (dr, du, dback_n, dn) = jax.lax.scan(step, dlast_BxU, now, reverse=True)
    return (dr, du, dn), dfirst_BxU, _of_kernels(before_TxBxU, (dr, du, dback_n)), None


gru.defvjp(_gru_saved, _gru_backward)


@jax.custom_vjp
def lstm(x: Arrays, hc_BxS: jax.Array, kernels: Arrays, keep_TxBx1: jax.Array) -> Outcome:
    """Outputs of an LSTM after each step.

    Args:
      x: Of the gates input, forget, cell, output: what comes from below, (time, lanes, units) each.
      hc_BxS: The output and the cell before the first step, side by side.
      kernels: Of the same gates, from the output, (units, units) each.
      keep_TxBx1: 0 where both are forgotten before the step, else 1. Has no gradient.

    Returns:
      The outputs (time, lanes, units), and the last output and cell side by side.
    """
    return _lstm_forward(x, hc_BxS, kernels, keep_TxBx1)[0]


def _lstm_forward(
    x: Arrays, hc_BxS: jax.Array, kernels: Arrays, keep_TxBx1: jax.Array
) -> tuple[Outcome, Arrays]:
    kernel_UxG = jnp.concatenate(kernels, axis=1)

    def step(hc: Outcome, now: tuple[Arrays, jax.Array]) -> tuple[Outcome, Arrays]:
        x_gates, keep_Bx1 = now
        h_BxU, c_BxU = (part * keep_Bx1 for part in hc)
        back = jnp.split(h_BxU @ kernel_UxG, 4, axis=1)
        z_i, z_f, z_g, z_o = (x_BxU + b_BxU for x_BxU, b_BxU in zip(x_gates, back, strict=True))
        i, f, g, o = nnx.sigmoid(z_i), nnx.sigmoid(z_f), jnp.tanh(z_g), nnx.sigmoid(z_o)
        c_BxU = f * c_BxU + i * g
        h_BxU = o * jnp.tanh(c_BxU)
        return (h_BxU, c_BxU), (h_BxU, c_BxU, i, f, g, o)

    h_BxU, c_BxU = jnp.split(hc_BxS, 2, axis=1)
    first: Outcome = (h_BxU, c_BxU)
    last, kept = jax.lax.scan(step, first, (x, keep_TxBx1))
    return (kept[0], jnp.concatenate(last, axis=1)), kept


def _lstm_saved(
    x: Arrays, hc_BxS: jax.Array, kernels: Arrays, keep_TxBx1: jax.Array
) -> tuple[Outcome, tuple[Arrays, jax.Array, Arrays, jax.Array]]:
    outcome, kept = _lstm_forward(x, hc_BxS, kernels, keep_TxBx1)
    return outcome, (kept, hc_BxS, kernels, keep_TxBx1)


def _lstm_backward(
    saved: tuple[Arrays, jax.Array, Arrays, jax.Array], gradients: Outcome
) -> Gradients:
    (out_TxBxU, cell_TxBxU, *gates), first_BxS, kernels, keep_TxBx1 = saved
    first = jnp.split(first_BxS, 2, axis=1)
    before_TxBxU = _before(first[0], out_TxBxU, keep_TxBx1)
    cell_before_TxBxU = _before(first[1], cell_TxBxU, keep_TxBx1)
    transposed = tuple(kernel.T for kernel in kernels)

    def step(dhc: Outcome, now: tuple[jax.Array, ...]) -> tuple[Outcome, Arrays]:
        dout_BxU, c_BxU, before_BxU, keep_Bx1, i, f, g, o = now
        dh_BxU, dc_BxU = dhc
        dh_BxU = dh_BxU + dout_BxU
        squashed = jnp.tanh(c_BxU)
        dc_BxU = dc_BxU + dh_BxU * o * (1 - squashed * squashed)
        d_gates = (
            dc_BxU * g * i * (1 - i),
            dc_BxU * before_BxU * f * (1 - f),
            dc_BxU * i * (1 - g * g),
            dh_BxU * squashed * o * (1 - o),
        )
        dh_BxU = _sum_of_products(d_gates, transposed) * keep_Bx1
        return (dh_BxU, dc_BxU * f * keep_Bx1), d_gates

    dout_TxBxU, dlast_BxS = gradients
    dh_BxU, dc_BxU = jnp.split(dlast_BxS, 2, axis=1)
    dlast: Outcome = (dh_BxU, dc_BxU)
    now = (dout_TxBxU, cell_TxBxU, cell_before_TxBxU, keep_TxBx1, *gates)
    dfirst, d_gates = jax.lax.scan(step, dlast, now, reverse=True)
    dkernels = _of_kernels(before_TxBxU, d_gates)
    return d_gates, jnp.concatenate(dfirst, axis=1), dkernels, None


lstm.defvjp(_lstm_saved, _lstm_backward)


def _before(first_BxU: jax.Array, after_TxBxU: jax.Array, keep_TxBx1: jax.Array) -> jax.Array:
    """What each step started from: the state after the one before, forgotten where it is to be."""
    return jnp.concatenate([first_BxU[None], after_TxBxU[:-1]]) * keep_TxBx1


def _sum_of_products(d_gates: Arrays, transposed: Arrays) -> jax.Array:
    first, *others = (d @ kernel for d, kernel in zip(d_gates, transposed, strict=True))
    return sum(others, start=first)


def _of_kernels(before_TxBxU: jax.Array, d_gates: Arrays) -> Arrays:
    """The gradient of each gate's kernel: one product over all steps and lanes."""
    units = before_TxBxU.shape[-1]
    # Transposed once for all gates; folded into each product it takes XLA's CPU code longer.
    before_Ux_TB = jax.lax.optimization_barrier(before_TxBxU.reshape(-1, units).T)
    return tuple(before_Ux_TB @ d_TxBxU.reshape(-1, units) for d_TxBxU in d_gates)
