"""Defines recurrent language models over bytes, GRU and LSTM (paper, section 4.2 and appendix I).

The paper gives sizes (embedding 128, state 512, readout 256 then 128) but no code. The docstrings
say which details it leaves open and how they are decided here.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx

from rigl_optax import condensed
from rigl_optax.export import Units
from rigl_optax.models import layers, recurrence

Cell = Literal["gru", "lstm"]
Carry = list[jax.Array]

# For each cell: its gates in the order of a fused kernel, and the number of arrays in its state.
GATES = {"gru": ("reset", "update", "candidate"), "lstm": ("input", "forget", "cell", "output")}
CANDIDATES = {"gru": "candidate", "lstm": "cell"}  # the gate that is written into the state
STATES = {"gru": 1, "lstm": 2}


class Gates(nnx.Module):
    """A linear map to all gates of a cell, with one fused kernel or one kernel for each gate.

    Both compute the same function, but are different layers to a sparse method:

    - Fused, `kernel` is one leaf (inputs, gates * units). All gates compete for its connections, so
      one gate may end up denser than another. ERK gives it a density in proportion to
      (inputs + gates * units) / (inputs * gates * units). It has a single sparsity.
    - Separate, each gate is a leaf of its own (inputs, units), `reset/kernel` and so on. Its number
      of connections never changes, and can be chosen for each gate, as by
      `overrides={"recurrent/reset/kernel": 0.5}`. ERK gives the smaller matrices a higher density,
      at the expense of the readout.

    Args:
      inputs: Width of the input.
      units: Width of each gate.
      gates: Names of the gates.
      fused: Whether all gates share one kernel.
      bias: Whether there is a bias, which starts at zero.
      kernel_init: Initializer of each gate's kernel (inputs, units).
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
        """Returns the kernel of each gate (inputs, units), an array or a `condensed.BlockSparse`.

        A fused `BlockSparse` or `CSR` is returned whole: (inputs, gates * units).
        """
        if not self.fused:
            return tuple(getattr(self, name)["kernel"].get_value() for name in self.names)
        kernel = self.kernel.get_value()
        if isinstance(kernel, condensed.BlockSparse | condensed.CSR):
            return (kernel,)
        return tuple(jnp.split(kernel, len(self.names), axis=1))

    def kernels_of_blocks(self) -> dict[str, str]:
        """Returns that all kernels may be blocks; see `layers.TakesBlocks`."""
        return {"kernel": ""} if self.fused else {f"{name}/kernel": "" for name in self.names}

    def project(self, x: jax.Array) -> tuple[jax.Array, ...]:
        """Multiplies [..., inputs] by each gate's kernel and adds the bias: [..., units] each."""
        wide = [x @ kernel for kernel in self.kernels()]
        # Each gate gets its own array: a step on slices of one array takes XLA's CPU code twice as
        # long.
        each = wide if len(wide) > 1 else jnp.split(wide[0], len(self.names), axis=-1)
        if self.bias is None:
            return tuple(each)
        biases = jnp.split(self.bias[...], len(self.names))
        return tuple(part + bias for part, bias in zip(each, biases, strict=True))


class Layer(nnx.Module):
    """One recurrent layer over a sequence; the input is projected for all steps at once.

    The GRU is that of Flax and cuDNN: the reset gate is applied after the recurrent kernel,
    `n = tanh(W x + b + r * (U h))`. The LSTM has a single bias and no peepholes. Input kernels
    start Lecun-normal, recurrent ones orthogonal for each gate, as in Flax.

    Args:
      cell: `gru` or `lstm`.
      inputs: Width of the input.
      units: Width of the state.
      fused: As in `Gates`.
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
        """Runs the cell over a sequence.

        Args:
          x_TxBxI: Input (time, lanes, inputs).
          carry_BxS: State before the first step, (lanes, units) for a GRU; output and cell
            concatenated, (lanes, 2 * units), for an LSTM.
          keep_TxB: (time, lanes), 0 where the state is reset before the step, else 1.

        Returns:
          Outputs (time, lanes, units), and the state after the last step.
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

    Bytes are embedded and go through recurrent layers and a readout. The paper does not state the
    following: ReLU between the layers of the readout, logits tied to the embedding (with a bias
    for each byte), and no dropout. By default all kernels are sparse and the embedding is dense
    (`rigl_optax.default_dense`).

    Args:
      cell: `gru` or `lstm`.
      hidden: Width of each recurrent layer.
      vocabulary: Number of symbols.
      embedding: Width of the embedding.
      readout: Widths of the linear layers after the recurrent ones.
      tied: Whether logits are products with the embedding; needs `readout[-1] == embedding`.
      fused: Whether the gates of a cell share one kernel; see `Gates`.
      rngs: Random keys (stream `params`).

    Raises:
      ValueError: If there is no such cell, a width is below 1, or the widths do not allow tying.

    Examples:
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
            raise ValueError(f"widths {widths}: each must be at least 1, of one layer or more")
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
        """Returns the state of each layer before the first byte: zeros, float32 (lanes, state)."""
        return [jnp.zeros((lanes, STATES[self.cell] * units)) for units in self.hidden]

    def __call__(
        self, tokens_BxT: jax.Array, carry: Carry, resets_BxT: jax.Array | None = None
    ) -> tuple[jax.Array, Carry]:
        """Computes the logits of the byte after each byte.

        Args:
          tokens_BxT: Integers from 0 to vocabulary - 1, (lanes, time).
          carry: From `initial_carry` or the call before.
          resets_BxT: Bool (lanes, time), True where a text begins: the state is reset before it.

        Returns:
          Logits float32 (lanes, time, vocabulary), and the carry after the last byte.
        """
        if resets_BxT is None:
            resets_BxT = jnp.zeros(tokens_BxT.shape, bool)
        # Time is the first axis inside, so that a step reads and writes contiguous memory.
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

    def units(self, walk: Units) -> None:
        """Describes itself to `export.compact`."""
        x = walk.embedding("embedding/embedding")
        for i in range(len(self.layers)):
            carry = f"carry/{i}" if isinstance(self, StreamingLM) else None
            x = walk.recurrent(x, f"layers/{i}", GATES[self.cell], CANDIDATES[self.cell], carry)
        for i in range(len(self.readout)):
            x = walk.layer(walk.relu(x) if i else x, f"readout/{i}")
        if self.tied:
            walk.outputs(walk.attend(x, "embedding/embedding", "bias"))
        else:
            walk.outputs(walk.layer(x, "logits"))


class CarryVariable(nnx.Variable[jax.Array]):
    """The state of a recurrent layer between calls; no parameter."""


class StreamingLM(RecurrentLM):
    """A `RecurrentLM` that keeps its state from call to call.

    Gradients do not flow through the state: backpropagation is truncated to one call.

    Args:
      *args: As in `RecurrentLM`.
      lanes: Number of sequences in a batch.
      **keys: As in `RecurrentLM`.

    Examples:
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
        """Returns logits of the byte after each byte, and updates the state.

        Args:
          tokens_BxT: Integers from 0 to vocabulary - 1, (lanes, time).
          resets_BxT: Bool (lanes, time), True where a text begins: the state is reset before it.

        Returns:
          float32 (lanes, time, vocabulary).
        """
        before = [jax.lax.stop_gradient(c[...]) for c in self.carry]
        logits_BxTxV, after = super().__call__(tokens_BxT, before, resets_BxT)
        for variable, value in zip(self.carry, after, strict=True):
            variable[...] = value
        return logits_BxTxV
