"""Scans a GRU or an LSTM over time, with hand-written gradients.

JAX's derivative of a scan adds to the gradient of the recurrent kernel at every step, which reads
and writes a matrix of that size each time. Here the backward scan stores the gradients of the
gates, and one product over all steps then gives the gradient of the kernel. Each gate is an array
of its own throughout. `benchmarks/recurrent.py` measures the gain.

Reverse mode works, and forward over reverse mode (Hessian-vector products); forward mode alone
does not.
"""

from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx

Arrays: TypeAlias = tuple[jax.Array, ...]  # one for each gate, or the residuals of a scan
Gradients: TypeAlias = tuple[Arrays, jax.Array, Arrays, None]
Outputs: TypeAlias = tuple[jax.Array, jax.Array]


@jax.custom_vjp
def gru(x: Arrays, h_BxU: jax.Array, kernels: Arrays, keep_TxBx1: jax.Array) -> Outputs:
    """Runs a GRU over time.

    Args:
      x: Input of the gates reset, update and candidate, after the input kernel and bias:
        (time, lanes, units) each.
      h_BxU: State before the first step, (lanes, units).
      kernels: Recurrent kernels of the same gates, (units, units) each; or, for inference, all side
        by side as one `condensed.CSR`, (units, 3 * units), which has no gradient here.
      keep_TxBx1: (time, lanes, 1), 0 where the state is reset before the step, else 1. Has no
        gradient.

    Returns:
      The states after each step (time, lanes, units), and the last one (lanes, units).
    """
    return _gru_scan(x, h_BxU, kernels, keep_TxBx1)[0]


def _gru_scan(
    x: Arrays, h_BxU: jax.Array, kernels: Arrays, keep_TxBx1: jax.Array
) -> tuple[Outputs, Arrays]:
    kernel_UxG = _side_by_side(kernels)

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


def _gru_fwd(
    x: Arrays, h_BxU: jax.Array, kernels: Arrays, keep_TxBx1: jax.Array
) -> tuple[Outputs, tuple[Arrays, jax.Array, Arrays, jax.Array]]:
    outputs, kept = _gru_scan(x, h_BxU, kernels, keep_TxBx1)
    return outputs, (kept, h_BxU, kernels, keep_TxBx1)


def _gru_backward(
    residuals: tuple[Arrays, jax.Array, Arrays, jax.Array], gradients: Outputs
) -> Gradients:
    (out_TxBxU, *gates), first_BxU, kernels, keep_TxBx1 = residuals
    before_TxBxU = _states_before(first_BxU, out_TxBxU, keep_TxBx1)
    transposed = _transposed(kernels)

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
    return (dr, du, dn), dfirst_BxU, _kernel_gradients(before_TxBxU, (dr, du, dback_n)), None


gru.defvjp(_gru_fwd, _gru_backward)


@jax.custom_vjp
def lstm(x: Arrays, hc_BxS: jax.Array, kernels: Arrays, keep_TxBx1: jax.Array) -> Outputs:
    """Runs an LSTM over time.

    Args:
      x: Input of the gates input, forget, cell and output, after the input kernel and bias:
        (time, lanes, units) each.
      hc_BxS: Output and cell before the first step, concatenated: (lanes, 2 * units).
      kernels: Recurrent kernels of the same gates, (units, units) each; or one as in `gru`.
      keep_TxBx1: (time, lanes, 1), 0 where output and cell are reset before the step, else 1. Has
        no gradient.

    Returns:
      The outputs after each step (time, lanes, units), and the last output and cell, concatenated
      (lanes, 2 * units).
    """
    return _lstm_scan(x, hc_BxS, kernels, keep_TxBx1)[0]


def _lstm_scan(
    x: Arrays, hc_BxS: jax.Array, kernels: Arrays, keep_TxBx1: jax.Array
) -> tuple[Outputs, Arrays]:
    kernel_UxG = _side_by_side(kernels)

    def step(hc: Outputs, now: tuple[Arrays, jax.Array]) -> tuple[Outputs, Arrays]:
        x_gates, keep_Bx1 = now
        h_BxU, c_BxU = (part * keep_Bx1 for part in hc)
        back = jnp.split(h_BxU @ kernel_UxG, 4, axis=1)
        z_i, z_f, z_g, z_o = (x_BxU + b_BxU for x_BxU, b_BxU in zip(x_gates, back, strict=True))
        i, f, g, o = nnx.sigmoid(z_i), nnx.sigmoid(z_f), jnp.tanh(z_g), nnx.sigmoid(z_o)
        c_BxU = f * c_BxU + i * g
        h_BxU = o * jnp.tanh(c_BxU)
        return (h_BxU, c_BxU), (h_BxU, c_BxU, i, f, g, o)

    h_BxU, c_BxU = jnp.split(hc_BxS, 2, axis=1)
    first: Outputs = (h_BxU, c_BxU)
    last, kept = jax.lax.scan(step, first, (x, keep_TxBx1))
    return (kept[0], jnp.concatenate(last, axis=1)), kept


def _lstm_fwd(
    x: Arrays, hc_BxS: jax.Array, kernels: Arrays, keep_TxBx1: jax.Array
) -> tuple[Outputs, tuple[Arrays, jax.Array, Arrays, jax.Array]]:
    outputs, kept = _lstm_scan(x, hc_BxS, kernels, keep_TxBx1)
    return outputs, (kept, hc_BxS, kernels, keep_TxBx1)


def _lstm_backward(
    residuals: tuple[Arrays, jax.Array, Arrays, jax.Array], gradients: Outputs
) -> Gradients:
    (out_TxBxU, cell_TxBxU, *gates), first_BxS, kernels, keep_TxBx1 = residuals
    first = jnp.split(first_BxS, 2, axis=1)
    before_TxBxU = _states_before(first[0], out_TxBxU, keep_TxBx1)
    cell_before_TxBxU = _states_before(first[1], cell_TxBxU, keep_TxBx1)
    transposed = _transposed(kernels)

    def step(dhc: Outputs, now: tuple[jax.Array, ...]) -> tuple[Outputs, Arrays]:
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
    dlast: Outputs = (dh_BxU, dc_BxU)
    now = (dout_TxBxU, cell_TxBxU, cell_before_TxBxU, keep_TxBx1, *gates)
    dfirst, d_gates = jax.lax.scan(step, dlast, now, reverse=True)
    dkernels = _kernel_gradients(before_TxBxU, d_gates)
    return d_gates, jnp.concatenate(dfirst, axis=1), dkernels, None


lstm.defvjp(_lstm_fwd, _lstm_backward)


def _side_by_side(kernels: Arrays) -> Any:
    """Returns the kernel of all gates, (units, gates * units)."""
    return kernels[0] if len(kernels) == 1 else jnp.concatenate(kernels, axis=1)


def _transposed(kernels: Arrays) -> Arrays:
    if len(kernels) == 1:
        raise ValueError(
            "a recurrent kernel of single weights (CSR) is for inference and has no gradient; "
            "train it dense with masks, or as blocks"
        )
    return tuple(kernel.T for kernel in kernels)


def _states_before(
    first_BxU: jax.Array, after_TxBxU: jax.Array, keep_TxBx1: jax.Array
) -> jax.Array:
    """Returns the state that each step starts from: that after the step before, or 0 at a reset."""
    return jnp.concatenate([first_BxU[None], after_TxBxU[:-1]]) * keep_TxBx1


def _sum_of_products(d_gates: Arrays, transposed: Arrays) -> jax.Array:
    first, *others = (d @ kernel for d, kernel in zip(d_gates, transposed, strict=True))
    return sum(others, start=first)


def _kernel_gradients(before_TxBxU: jax.Array, d_gates: Arrays) -> Arrays:
    """Computes the gradient of each gate's kernel, one product over all steps and lanes."""
    units = before_TxBxU.shape[-1]
    # The barrier keeps one transposed copy for all gates; XLA on the CPU would fold the transpose
    # into each product, which is slower.
    before_Ux_TB = jax.lax.optimization_barrier(before_TxBxU.reshape(-1, units).T)
    return tuple(before_Ux_TB @ d_TxBxU.reshape(-1, units) for d_TxBxU in d_gates)
