"""Recurrent language models over bytes: LSTM and GRU of the paper's section 4.2 and appendix I.

The paper gives sizes (embedding 128, state 512, readout 256 then 128) and no code. What it leaves
open is decided here, and said where it is.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx

from rigl_optax import condensed
from rigl_optax.models import layers, recurrence

Cell = Literal["gru", "lstm"]
Carry = list[jax.Array]

# Of each cell: its gates in the order in which they lie in a fused kernel, and arrays in its state.
GATES = {"gru": ("reset", "update", "candidate"), "lstm": ("input", "forget", "cell", "output")}
STATES = {"gru": 1, "lstm": 2}


class Gates(nnx.Module):
    """A linear map to all gates of a cell: one fused kernel, or one for each gate.

    Both compute the same. To a sparse method they differ in what is a layer:

    - Fused, `kernel` is one leaf (inputs, gates * units). All gates compete for its connections, so
      a gate may end up denser than another. ERK gives it a density in proportion to
      (inputs + gates * units) / (inputs * gates * units). It has one sparsity, none by gate.
    - Separate, each gate is a leaf of its own (inputs, units), `reset/kernel` and so on. Its number
      of connections never changes and can be chosen by gate, with
      `overrides={"recurrent/reset/kernel": 0.5}`. ERK sees smaller matrices, and gives them more
      of the connections that they share with the readout.

    Args:
      inputs: Width of what comes in.
      units: Width of each gate.
      gates: Their names.
      fused: One kernel or several.
      bias: Whether there is a bias, zero at first.
      kernel_init: Of each gate's kernel (inputs, units).
      rngs: Random keys (stream `params`).
    """

    def __init__(
        self,
        inputs: int,
        units: int,
        gates: Sequence[str],
        *,
        fused: bool,
        bias: bool,
        kernel_init: Callable[..., jax.Array],
        rngs: nnx.Rngs,
    ) -> None:
        kernels = [kernel_init(rngs.params(), (inputs, units), jnp.float32) for _ in gates]
        self.names = tuple(gates)
        self.fused = fused
        if fused:
            self.kernel = nnx.Param(jnp.concatenate(kernels, axis=1))
        else:
            for name, kernel in zip(gates, kernels, strict=True):
                setattr(self, name, nnx.Dict(kernel=nnx.Param(kernel)))
        self.bias = nnx.Param(jnp.zeros((len(gates) * units,))) if bias else None

    def kernels(self) -> tuple[Any, ...]:
        """The kernel of each gate (inputs, units): arrays, or `condensed.BlockSparse` each.

        A fused one of stored blocks stays what it is: (inputs, gates * units).
        """
        if not self.fused:
            return tuple(getattr(self, name)["kernel"].get_value() for name in self.names)
        kernel = self.kernel.get_value()
        if isinstance(kernel, condensed.BlockSparse):
            return (kernel,)
        return tuple(jnp.split(kernel, len(self.names), axis=1))

    def kernels_of_blocks(self) -> dict[str, str]:
        """As `layers.refused` asks for it."""
        return {"kernel": ""} if self.fused else {f"{name}/kernel": "" for name in self.names}

    def project(self, x: jax.Array) -> tuple[jax.Array, ...]:
        """Products of [..., inputs] with each gate's kernel, and the bias: [..., units] each."""
        wide = [x @ kernel for kernel in self.kernels()]
        # An array for each gate: XLA's CPU code for a step is twice as fast as on slices of one.
        each = wide if len(wide) > 1 else jnp.split(wide[0], len(self.names), axis=-1)
        if self.bias is None:
            return tuple(each)
        biases = jnp.split(self.bias[...], len(self.names))
        return tuple(part + bias for part, bias in zip(each, biases, strict=True))


class Layer(nnx.Module):
    """One recurrent layer over a sequence; the input is projected for all steps at once.

    The GRU is that of Flax and cuDNN: the reset gate scales what comes back from the state after
    its kernel, `n = tanh(W x + b + r * (U h))`. The LSTM has one bias in all and no peepholes.
    Input kernels start Lecun-normal, recurrent ones orthogonal by gate, as in Flax.

    Args:
      cell: `gru` or `lstm`.
      inputs: Width of what comes in.
      units: Width of the state.
      fused: As of `Gates`.
      rngs: Random keys (stream `params`).
    """

    def __init__(self, cell: Cell, inputs: int, units: int, *, fused: bool, rngs: nnx.Rngs) -> None:
        self.cell = cell
        self.units = units
        names = GATES[cell]
        self.input = Gates(
            inputs,
            units,
            names,
            fused=fused,
            bias=True,
            kernel_init=nnx.initializers.lecun_normal(),
            rngs=rngs,
        )
        self.recurrent = Gates(
            units,
            units,
            names,
            fused=fused,
            bias=False,
            kernel_init=nnx.initializers.orthogonal(),
            rngs=rngs,
        )

    def __call__(
        self, x_TxBxI: jax.Array, carry_BxS: jax.Array, keep_TxB: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Outputs (time, lanes, units) and the state after the last step.

        Args:
          x_TxBxI: What comes in.
          carry_BxS: The state before the first step; an LSTM's two parts side by side.
          keep_TxB: 0 where the state is to be forgotten before the step, else 1.
        """
        projected = self.input.project(x_TxBxI)
        keep_TxBx1 = keep_TxB[:, :, None].astype(carry_BxS.dtype)
        kernels = self.recurrent.kernels()
        scans: Any = recurrence
        if any(isinstance(kernel, condensed.BlockSparse) for kernel in kernels):
            scans, kernels = condensed, tuple(map(condensed.as_blocks, kernels))
        scan = scans.gru if self.cell == "gru" else scans.lstm
        return scan(projected, carry_BxS, kernels, keep_TxBx1)


class RecurrentLM(nnx.Module):
    """Predicts the next byte from those before it.

    Bytes are embedded, go through recurrent layers and a readout; ours, where the paper is silent:
    ReLU between the layers of the readout, logits tied to the embedding (with one bias for each
    byte) where the widths allow it, and no dropout. By default all kernels are sparse and the
    embedding is dense (`rigl_optax.default_dense`).

    Args:
      cell: `gru` or `lstm`.
      hidden: Width of each recurrent layer.
      vocabulary: Number of symbols.
      embedding: Width of the embedding.
      readout: Widths of the layers after the recurrent ones.
      tied: Whether the logits are products with the embedding; needs `readout[-1] == embedding`.
      fused: Whether the gates of a cell share one kernel; see `Gates`.
      rngs: Random keys (stream `params`).

    Raises:
      ValueError: If there is no such cell, a width is below 1, or widths do not allow for tying.

    Example:
      >>> from flax import nnx
      >>> import jax.numpy as jnp
      >>> model = RecurrentLM("gru", (64,), rngs=nnx.Rngs(0))
      >>> tokens = jnp.zeros((2, 10), jnp.uint8)
      >>> logits, carry = model(tokens, model.initial_carry(2))
      >>> logits.shape, [c.shape for c in carry]
      ((2, 10, 256), [(2, 64)])

    References:
      Evci et al. 2020, section 4.2 and appendix I: state 512, 1,179,648 weights when tied.
    """

    def __init__(
        self,
        cell: Cell = "gru",
        hidden: Sequence[int] = (512,),
        *,
        vocabulary: int = 256,
        embedding: int = 128,
        readout: Sequence[int] = (256, 128),
        tied: bool = True,
        fused: bool = True,
        rngs: nnx.Rngs,
    ) -> None:
        if cell not in get_args(Cell):
            raise ValueError(f"cell={cell!r}: must be one of {', '.join(get_args(Cell))}")
        widths = [vocabulary, embedding, *hidden, *readout]
        if min(widths) < 1 or not hidden:
            raise ValueError(f"widths {widths}: every one must be at least 1, of one layer or more")
        last = [*hidden, *readout][-1]
        if tied and last != embedding:
            raise ValueError(
                f"tied=True: the last width is {last}, the embedding {embedding}; they must be the "
                "same"
            )
        self.cell, self.hidden, self.tied = cell, tuple(hidden), tied
        self.embedding = nnx.Embed(vocabulary, embedding, rngs=rngs)
        self.layers = nnx.List(
            Layer(cell, n_in, n_out, fused=fused, rngs=rngs)
            for n_in, n_out in itertools.pairwise([embedding, *hidden])
        )
        self.readout = nnx.List(
            layers.Linear(n_in, n_out, rngs=rngs)
            for n_in, n_out in itertools.pairwise([hidden[-1], *readout])
        )
        if tied:
            self.bias = nnx.Param(jnp.zeros((vocabulary,)))
        else:
            self.logits = layers.Linear(last, vocabulary, rngs=rngs)

    def initial_carry(self, lanes: int) -> Carry:
        """The state of each layer before the first byte: zeros, float32 (lanes, state)."""
        return [jnp.zeros((lanes, STATES[self.cell] * units)) for units in self.hidden]

    def __call__(
        self, tokens_BxT: jax.Array, carry: Carry, resets_BxT: jax.Array | None = None
    ) -> tuple[jax.Array, Carry]:
        """Logits of the byte after each byte, and the state after the last.

        Args:
          tokens_BxT: Integers from 0 to vocabulary - 1, (lanes, time).
          carry: From `initial_carry` or the call before.
          resets_BxT: Bool (lanes, time): where a text begins, before which the state is forgotten.

        Returns:
          float32 (lanes, time, vocabulary), and the carry.
        """
        if resets_BxT is None:
            resets_BxT = jnp.zeros(tokens_BxT.shape, bool)
        # Time comes first inside, so that what a step reads and writes lies together.
        keep_TxB = 1 - resets_BxT.T.astype(jnp.int32)
        x_TxBxD = self.embedding(tokens_BxT.T.astype(jnp.int32))
        after = []
        for layer, carry_BxS in zip(self.layers, carry, strict=True):
            x_TxBxD, last_BxS = layer(x_TxBxD, carry_BxS, keep_TxB)
            after.append(last_BxS)
        for i, linear in enumerate(self.readout):
            x_TxBxD = linear(nnx.relu(x_TxBxD) if i else x_TxBxD)
        x_BxTxD = x_TxBxD.swapaxes(0, 1)
        if self.tied:
            return self.embedding.attend(x_BxTxD) + self.bias[...], after
        return self.logits(x_BxTxD), after


class CarryVariable(nnx.Variable[jax.Array]):
    """What a layer remembers between calls; no parameter."""


class StreamingLM(RecurrentLM):
    """A `RecurrentLM` that remembers its state from call to call.

    Gradients do not flow through what it remembers: backpropagation is truncated to a call.

    Args:
      *args: As of `RecurrentLM`.
      lanes: Sequences that are read side by side.
      **keys: As of `RecurrentLM`.

    Example:
      >>> from flax import nnx
      >>> import jax.numpy as jnp
      >>> model = StreamingLM("lstm", (64,), lanes=2, rngs=nnx.Rngs(0))
      >>> tokens = jnp.zeros((2, 10), jnp.uint8)
      >>> model(tokens, jnp.zeros((2, 10), bool)).shape
      (2, 10, 256)
      >>> bool((model.carry[0][...] != 0).any())
      True
    """

    def __init__(self, *args: Any, lanes: int, **keys: Any) -> None:
        super().__init__(*args, **keys)
        self.carry = nnx.List(CarryVariable(c) for c in self.initial_carry(lanes))

    def __call__(self, tokens_BxT: jax.Array, resets_BxT: jax.Array) -> jax.Array:  # type: ignore[override]
        """Logits of the byte after each byte: float32 (lanes, time, vocabulary)."""
        before = [jax.lax.stop_gradient(c[...]) for c in self.carry]
        logits_BxTxV, after = super().__call__(tokens_BxT, before, resets_BxT)
        for variable, value in zip(self.carry, after, strict=True):
            variable[...] = value
        return logits_BxTxV
