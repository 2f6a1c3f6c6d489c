"""The scans of a GRU and an LSTM with condensed recurrent kernels, with gradients written out.

JAX would add up a gradient of the kernel, and scores, at every step. Here one product after the
backward scan gives the gradient of all steps, and the scores are those of the summed gradient, not
a sum of scores. The arguments are those of the dense scans in `rigl_optax.models.recurrence`.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from rigl_optax.condensed import _devices
from rigl_optax.condensed.blocks import _product
from rigl_optax.condensed.blocks._kernel import BlockSparse, Spec

Arrays: TypeAlias = tuple[jax.Array, ...]  # one for each gate, or for each part of a state
Kernels: TypeAlias = tuple[BlockSparse, ...]  # of one gate each, or of several side by side


def gru(
    x: Arrays, h_BxU: jax.Array, kernels: Kernels, keep_TxBx1: jax.Array
) -> tuple[jax.Array, jax.Array]:
    r"""Runs a GRU over a sequence; the one of Flax and cuDNN.

    $$
    \begin{aligned}
    r &= \sigma(x_r + h U_r), \qquad u = \sigma(x_u + h U_u) \\
    n &= \tanh(x_n + r \odot (h U_n)), \qquad h \leftarrow (1 - u) \odot n + u \odot h
    \end{aligned}
    $$

    Args:
      x: Projected inputs of the gates reset, update and candidate, (time, lanes, units) each.
      h_BxU: The state before the first step. Its dtype is that of the computation.
      kernels: Condensed kernels from the state to the same gates: one of (units, units) for each,
        or fewer of several gates side by side, as one of (units, 3 * units).
      keep_TxBx1: 0 where the state is forgotten before the step, else 1. Has no gradient.

    Returns:
      The states (time, lanes, units), and the last of them again.

    Raises:
      ValueError: If there are not three gates, or the kernels do not fit them.

    Examples:
      >>> import jax, jax.numpy as jnp, rigl_optax
      >>> from rigl_optax import condensed
      >>> topology = condensed.random_topology((32, 96), 0.5, rigl_optax.Block(8, 8))
      >>> values = condensed.random_values(jax.random.key(0), topology)
      >>> x, h = (jnp.ones((5, 2, 32)),) * 3, jnp.zeros((2, 32))
      >>> kernels = (condensed.BlockSparse(values, topology),)
      >>> states, last = condensed.gru(x, h, kernels, jnp.ones((5, 2, 1)))
      >>> states.shape, last.shape
      ((5, 2, 32), (2, 32))
    """
    out_TxBxU, (last_BxU,) = _run(_GRU, x, (h_BxU,), kernels, keep_TxBx1)
    return out_TxBxU, last_BxU


def lstm(
    x: Arrays, hc_BxS: jax.Array, kernels: Kernels, keep_TxBx1: jax.Array
) -> tuple[jax.Array, jax.Array]:
    r"""Runs an LSTM without peepholes over a sequence.

    $$
    \begin{aligned}
    i &= \sigma(x_i + h U_i), \quad f = \sigma(x_f + h U_f), \quad
    g = \tanh(x_g + h U_g), \quad o = \sigma(x_o + h U_o) \\
    c &\leftarrow f \odot c + i \odot g, \qquad h \leftarrow o \odot \tanh(c)
    \end{aligned}
    $$

    Args:
      x: Projected inputs of the gates input, forget, cell and output, (time, lanes, units) each.
      hc_BxS: The output and the cell before the first step, side by side: (lanes, 2 * units).
      kernels: Condensed kernels from the output to the same gates, as in `gru`.
      keep_TxBx1: 0 where both are forgotten before the step, else 1. Has no gradient.

    Returns:
      The outputs (time, lanes, units), and the last output and cell side by side.

    Raises:
      ValueError: If there are not four gates, or the kernels do not fit them.
    """
    h_BxU, c_BxU = jnp.split(hc_BxS, 2, axis=1)
    out_TxBxU, last = _run(_LSTM, x, (h_BxU, c_BxU), kernels, keep_TxBx1)
    return out_TxBxU, jnp.concatenate(last, axis=1)


class _Cell(NamedTuple):
    """One step of a cell and its derivative, of arrays (lanes, units).

    `x` are the projected inputs of the gates, and `recurrent` the products of the output with the
    kernels. The first array of a state is the output.

    Attributes:
      gates: Number of gates.
      forward: `forward(x, recurrent, state) -> (new_state, residuals)`.
      backward: `backward(d_new_state, state, new_state, residuals) -> (d_state, d_gates)`.
        `d_state` leaves out the gradient through the kernels, which the scan adds. `d_gates`
        begins with the gradients of `recurrent`.
      d_x: Indices in `d_gates` of the gradients of `x`.
    """

    gates: int
    forward: Callable[[Arrays, Arrays, Arrays], tuple[Arrays, Arrays]]
    backward: Callable[[Arrays, Arrays, Arrays, Arrays], tuple[Arrays, Arrays]]
    d_x: tuple[int, ...]


def _gru_forward(x: Arrays, recurrent: Arrays, state: Arrays) -> tuple[Arrays, Arrays]:
    (h,) = state
    r, u = jax.nn.sigmoid(x[0] + recurrent[0]), jax.nn.sigmoid(x[1] + recurrent[1])
    n = jnp.tanh(x[2] + r * recurrent[2])
    return ((1 - u) * n + u * h,), (r, u, n, recurrent[2])


def _gru_backward(
    d_new_state: Arrays, state: Arrays, new_state: Arrays, residuals: Arrays
) -> tuple[Arrays, Arrays]:
    (dh,), (h,), (r, u, n, recurrent_n) = d_new_state, state, residuals
    du = dh * (h - n) * u * (1 - u)
    dn = dh * (1 - u) * (1 - n * n)
    dr = dn * recurrent_n * r * (1 - r)
    # The candidate has two gradients: its recurrent product is scaled by the reset gate, x is not.
    return (dh * u,), (dr, du, dn * r, dn)


def _lstm_forward(x: Arrays, recurrent: Arrays, state: Arrays) -> tuple[Arrays, Arrays]:
    z_i, z_f, z_g, z_o = (below + back for below, back in zip(x, recurrent, strict=True))
    i, f, g, o = jax.nn.sigmoid(z_i), jax.nn.sigmoid(z_f), jnp.tanh(z_g), jax.nn.sigmoid(z_o)
    c = f * state[1] + i * g
    return (o * jnp.tanh(c), c), (i, f, g, o)


def _lstm_backward(
    d_new_state: Arrays, state: Arrays, new_state: Arrays, residuals: Arrays
) -> tuple[Arrays, Arrays]:
    (dh, dc), (i, f, g, o), squashed = d_new_state, residuals, jnp.tanh(new_state[1])
    dc = dc + dh * o * (1 - squashed * squashed)
    d_gates = (
        dc * g * i * (1 - i),
        dc * state[1] * f * (1 - f),
        dc * i * (1 - g * g),
        dh * squashed * o * (1 - o),
    )
    return (jnp.zeros_like(dh), dc * f), d_gates


_GRU = _Cell(3, _gru_forward, _gru_backward, (0, 1, 3))
_LSTM = _Cell(4, _lstm_forward, _lstm_backward, (0, 1, 2, 3))


def _run(
    cell: _Cell, x: Arrays, first: Arrays, kernels: Kernels, keep_TxBx1: jax.Array
) -> tuple[jax.Array, Arrays]:
    units, dtype, shapes = first[0].shape[-1], first[0].dtype, [k.shape for k in kernels]
    if len(x) != cell.gates:
        raise ValueError(f"x has {len(x)} gates: must be {cell.gates}")
    are_gates = all(len(s) == 2 and s[0] == units and s[1] % units == 0 for s in shapes)
    if not are_gates or sum(s[1] for s in shapes) != cell.gates * units:
        raise ValueError(
            f"kernels of shapes {shapes}: must be {cell.gates} of {(units, units)}, or fewer of "
            "several gates side by side"
        )

    def scan(
        x: Arrays, first: Arrays, kernels: Kernels, keep_TxBx1: jax.Array
    ) -> tuple[jax.Array, Arrays]:
        typed = (BlockSparse(k.values.astype(dtype), k.topology, k.probe) for k in kernels)
        return _scan(cell, x, first, tuple(typed), keep_TxBx1)

    cut = _devices.examples(x[0], 0, 2)
    if cut is not None:
        lanes = PartitionSpec(cut[1])
        scan = _devices.by_parts(scan, (cut, lanes, PartitionSpec(), cut), (cut, lanes))
    return scan(x, first, kernels, keep_TxBx1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(
    cell: _Cell, x: Arrays, first: Arrays, kernels: Kernels, keep_TxBx1: jax.Array
) -> tuple[jax.Array, Arrays]:
    return _scan_forward(cell, x, first, kernels, keep_TxBx1)[0]


def _scan_forward(
    cell: _Cell, x: Arrays, first: Arrays, kernels: Kernels, keep_TxBx1: jax.Array
) -> tuple[tuple[jax.Array, Arrays], Any]:
    def step(state: Arrays, now: tuple[Arrays, jax.Array]) -> tuple[Arrays, tuple[Arrays, Arrays]]:
        x_gates, keep_Bx1 = now
        state = tuple(part * keep_Bx1 for part in state)
        recurrent = tuple(gate for kernel in kernels for gate in _to_gates(kernel, state[0]))
        new_state, residuals = cell.forward(x_gates, recurrent, state)
        return new_state, (new_state, residuals)

    last, (new_states, residuals) = jax.lax.scan(step, first, (x, keep_TxBx1))
    return (new_states[0], last), (new_states, residuals, first, kernels, keep_TxBx1)


def _scan_backward(cell: _Cell, saved: Any, gradients: Any) -> tuple[Any, ...]:
    new_states, residuals, first, kernels, keep_TxBx1 = saved
    states = tuple(
        jnp.concatenate([start[None], part[:-1]]) * keep_TxBx1
        for start, part in zip(first, new_states, strict=True)
    )

    def step(d_state: Arrays, now: Any) -> tuple[Arrays, Arrays]:
        d_out, keep_Bx1, *arrays = now
        d_state = (d_state[0] + d_out, *d_state[1:])
        (dh, *others), d_gates = cell.backward(d_state, *arrays)
        for kernel, d_kernel_gates in _by_kernel(kernels, d_gates):
            dh = dh + _from_gates(kernel, d_kernel_gates)
        return tuple(part * keep_Bx1 for part in (dh, *others)), d_gates

    dout_TxBxU, dlast = gradients
    now = (dout_TxBxU, keep_TxBx1, states, new_states, residuals)
    dfirst, d_gates = jax.lax.scan(step, dlast, now, reverse=True)
    h_NxU = _all_steps(states[0])
    dkernels = tuple(
        _kernel_gradient(kernel, h_NxU, d_NxG)
        for kernel, d_NxG in _by_kernel(kernels, tuple(map(_all_steps, d_gates)))
    )
    return tuple(d_gates[i] for i in cell.d_x), dfirst, dkernels, None


_scan.defvjp(_scan_forward, _scan_backward)


def _to_gates(kernel: BlockSparse, h_BxU: jax.Array) -> list[jax.Array]:
    """Multiplies the output by a kernel: (lanes, units) for each of its gates."""
    rows, cols, (_, outputs) = kernel.topology.rows, kernel.topology.cols, kernel.shape
    y_BxG = _product.forward(kernel.values, rows, cols, h_BxU, outputs).astype(h_BxU.dtype)
    return jnp.split(y_BxG, _gates(kernel), axis=1)


def _from_gates(kernel: BlockSparse, d_BxG: jax.Array) -> jax.Array:
    """Pulls the gradient of a kernel's gates, side by side, back to the output: (lanes, units)."""
    rows, cols, (inputs, _) = kernel.topology.rows, kernel.topology.cols, kernel.shape
    return _product.backward_input(kernel.values, rows, cols, d_BxG, inputs).astype(d_BxG.dtype)


def _kernel_gradient(kernel: BlockSparse, h_NxU: jax.Array, d_NxG: jax.Array) -> BlockSparse:
    """Computes the gradient of a kernel, summed over all N, and its scores if there is a probe."""
    topology, probe = kernel.topology, kernel.probe
    block = topology.block.rows, topology.block.cols
    values = _product.backward_values(topology.rows, topology.cols, h_NxU, d_NxG, block)
    values = _devices.summed(values, kernel.values).astype(kernel.values.dtype)
    nothing: Any = None  # indices have no gradient
    if probe is None:
        return BlockSparse(values, nothing, None)
    spec = Spec(topology.block, topology.shape)
    scores = _product.scores(h_NxU, d_NxG, spec.sizes(), block, spec.score(0, 2), probe)
    return BlockSparse(values, nothing, scores.astype(probe.dtype))


def _by_kernel(kernels: Kernels, d_gates: Arrays) -> list[tuple[BlockSparse, jax.Array]]:
    """Pairs each kernel with the arrays of its gates, put side by side."""
    found, at = [], 0
    for kernel in kernels:
        end = at + _gates(kernel)
        found.append((kernel, jnp.concatenate(d_gates[at:end], axis=1)))
        at = end
    return found


def _gates(kernel: BlockSparse) -> int:
    return kernel.shape[1] // kernel.shape[0]


def _all_steps(x_TxBxU: jax.Array) -> jax.Array:
    """Flattens to (time * lanes, units)."""
    return x_TxBxU.reshape(-1, x_TxBxU.shape[2])
