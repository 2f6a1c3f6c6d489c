"""Flax NNX layers with condensed kernels. Needs Flax; the rest of `condensed` does not."""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from rigl_optax import _paths
from rigl_optax._structures import UNSTRUCTURED, Block, Structures
from rigl_optax._types import PyTree, Seed
from rigl_optax.condensed import _conversion
from rigl_optax.condensed.blocks import _recurrence, _topology
from rigl_optax.condensed.blocks._convolution import Padding, convolve
from rigl_optax.condensed.blocks._kernel import BlockSparse
from rigl_optax.condensed.blocks._topology import Topology
from rigl_optax.condensed.single._csr import CSR


class Index(nnx.Variable):
    """Where the blocks of a kernel are: a `Topology`. No parameter: it has no gradient."""


class _Condensed(nnx.Module):
    """Values of stored blocks, where they are, and a bias."""

    def __init__(
        self,
        shape: tuple[int, ...],
        sparsity: float,
        block: Block,
        use_bias: bool,
        dtype: jax.typing.DTypeLike | None,
        param_dtype: jax.typing.DTypeLike,
        seed: Seed,
        rngs: nnx.Rngs,
        position: int = 0,
    ) -> None:
        topology = _topology.random_topology(shape, sparsity, block, seed=seed, position=position)
        self.topology = Index(topology)
        self.kernel = nnx.Param(_topology.random_values(rngs.params(), topology, param_dtype))
        self.bias = nnx.Param(jnp.zeros(shape[-1], param_dtype)) if use_bias else None
        self.dtype = dtype

    def bound(self) -> Any:
        """The kernel; as it is, or one that `bind` has put in the place of its values."""
        kernel = self.kernel.get_value()
        if isinstance(kernel, BlockSparse | CSR):
            return kernel
        return _conversion.bind({"": kernel}, {"": self.topology.get_value()})[""]

    def ready(self, x: jax.Array) -> tuple[jax.Array, Any]:
        """Activations and kernel in the dtype of the computation."""
        kernel = self.bound()
        if self.dtype is None:
            return x, kernel
        return x.astype(self.dtype), kernel.astype(self.dtype)

    def add_bias(self, y: jax.Array) -> jax.Array:
        """`y` plus the bias, if there is one."""
        return y if self.bias is None else y + self.bias[...].astype(y.dtype)


class SparseLinear(_Condensed):
    """A linear map of the last axis with a condensed kernel: as `nnx.Linear`.

    Args:
      in_features: Width of what comes in.
      out_features: Width of what goes out.
      sparsity: Fraction of blocks that are absent.
      block: Their size.
      use_bias: Whether there is a bias, zero at first.
      dtype: Of the computation; None for that of the parameters and activations.
      param_dtype: Of the parameters.
      seed: Of the random blocks: another for each layer.
      rngs: Random keys for the initial values (stream `params`).

    Example:
      >>> from flax import nnx
      >>> import jax.numpy as jnp, rigl_optax
      >>> from rigl_optax.condensed.layers import SparseLinear
      >>> block = rigl_optax.Block(16, 16)
      >>> layer = SparseLinear(64, 32, sparsity=0.75, block=block, seed=1, rngs=nnx.Rngs(0))
      >>> layer(jnp.ones((8, 64))).shape, layer.kernel.shape
      ((8, 32), (2, 16, 16))
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        sparsity: float,
        block: Block,
        use_bias: bool = True,
        dtype: jax.typing.DTypeLike | None = None,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
        seed: Seed,
        rngs: nnx.Rngs,
    ) -> None:
        shape = (in_features, out_features)
        super().__init__(shape, sparsity, block, use_bias, dtype, param_dtype, seed, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., in_features] to [..., out_features]."""
        x, kernel = self.ready(x)
        return self.add_bias(x @ kernel)


class _Converted(SparseLinear):
    """A trained `nnx.Linear` with what is stored of its kernel."""

    def __init__(self, layer: nnx.Linear, kernel: jax.Array, topology: Any) -> None:
        self.topology, self.kernel = Index(topology), nnx.Param(kernel)
        self.bias, self.dtype = layer.bias, layer.dtype


def condense(
    model: nnx.Module, params: PyTree, masks: PyTree, structure: Structures = UNSTRUCTURED
) -> nnx.Module:
    """Puts trained weights into a model, and stored weights alone into its linear layers, in place.

    Args:
      model: Any NNX model. Its `nnx.Linear` layers that are sparse become condensed layers; all
        other kernels stay dense.
      params: Its parameters, by path, as `export.read(...).params`.
      masks: Bool, by path, as `export.read(...).masks`.
      structure: As in `condensed.condense`: single weights, or a `Block`.

    Returns:
      The model.

    Raises:
      ValueError: If params are not those of the model, or masks not those of params.

    Example:
      >>> from flax import nnx
      >>> import jax.numpy as jnp, numpy as np
      >>> from rigl_optax.condensed import layers
      >>> model = nnx.Sequential(nnx.Linear(4, 4, rngs=nnx.Rngs(0)))
      >>> mask = np.eye(4, dtype=bool)
      >>> params = {"layers": {"0": {"kernel": 2.0 * mask, "bias": np.zeros(4)}}}
      >>> model = layers.condense(model, params, {"layers": {"0": {"kernel": mask}}})
      >>> model(jnp.ones((1, 4))).tolist(), model.layers[0].kernel.shape
      ([[2.0, 2.0, 2.0, 2.0]], (4,))
    """
    named, shapes = dict(_paths.flatten_with_paths(params)), {}
    state = nnx.state(model, nnx.Param)
    for path, leaf in _paths.flatten_with_paths(state):
        shapes[path] = tuple(leaf.shape)
    wrong = sorted(
        p for p in {*named, *shapes} if p not in named or shapes.get(p) != named[p].shape
    )
    if wrong:
        raise ValueError(f"params are not those of the model: {_paths.listing(wrong)}")
    new = [jnp.asarray(named[path], leaf.dtype) for path, leaf in _paths.flatten_with_paths(state)]
    nnx.update(model, jax.tree.unflatten(jax.tree.structure(state), new))
    children = [
        (parent, key, child, "/".join(map(str, (*at, key, "kernel"))))
        for at, parent in nnx.iter_modules(model)
        for key, child in nnx.iter_children(parent)
        if isinstance(child, nnx.Linear)
    ]
    linear = {path for *_, path in children}
    own = {p: mask for p, mask in _paths.flatten_with_paths(masks) if p in linear}
    if not own:
        return model
    weights, topologies = _conversion.condense({p: named[p] for p in own}, own, structure)
    for parent, key, child, path in children:
        if path in topologies:
            layer = _Converted(child, jnp.asarray(weights[path]), topologies[path])
            if isinstance(parent, nnx.List):
                parent[int(str(key))] = layer
            else:
                setattr(parent, str(key), layer)
    return model


class SparseConv(_Condensed):
    """A convolution of images with a condensed kernel: as `nnx.Conv`, all taps of a block together.

    Args:
      in_features: Channels of what comes in.
      out_features: Channels of what goes out.
      kernel_size: Height and width of the window.
      sparsity: Fraction of blocks that are absent.
      block: Their size, in channels.
      strides: Of the window.
      padding: As in `convolve`.
      use_bias: Whether there is a bias, zero at first.
      dtype: Of the computation; None for that of the parameters and activations.
      param_dtype: Of the parameters.
      seed: Of the random blocks: another for each layer.
      rngs: Random keys for the initial values (stream `params`).

    Example:
      >>> from flax import nnx
      >>> import jax.numpy as jnp, rigl_optax
      >>> from rigl_optax.condensed.layers import SparseConv
      >>> block = rigl_optax.Block(4, 8)
      >>> layer = SparseConv(8, 16, (3, 3), sparsity=0.5, block=block, seed=1, rngs=nnx.Rngs(0))
      >>> layer(jnp.ones((2, 6, 6, 8))).shape, layer.kernel.shape
      ((2, 6, 6, 16), (2, 3, 3, 4, 8))
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: Sequence[int],
        *,
        sparsity: float,
        block: Block,
        strides: Sequence[int] = (1, 1),
        padding: Padding = "SAME",
        use_bias: bool = True,
        dtype: jax.typing.DTypeLike | None = None,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
        seed: Seed,
        rngs: nnx.Rngs,
    ) -> None:
        height, width = kernel_size
        shape = (height, width, in_features, out_features)
        super().__init__(shape, sparsity, block, use_bias, dtype, param_dtype, seed, rngs)
        self.strides = tuple(strides)
        self.padding = padding

    def __call__(self, x: jax.Array) -> jax.Array:
        """[batch, height, width, in_features] to [..., out_features]."""
        x, kernel = self.ready(x)
        return self.add_bias(convolve(x, kernel, strides=self.strides, padding=self.padding))


class _Recurrent(nnx.Module):
    """A cell over sequences; what comes in is projected for all steps at once."""

    gates: ClassVar[int]
    parts: ClassVar[int]  # of the state
    scan: ClassVar[Callable[..., tuple[jax.Array, jax.Array]]]

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        *,
        sparsity: float,
        block: Block,
        dtype: jax.typing.DTypeLike | None = None,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
        seed: Seed,
        rngs: nnx.Rngs,
    ) -> None:
        width = self.gates * hidden_features
        self.hidden_features = hidden_features
        self.input = SparseLinear(
            in_features,
            width,
            sparsity=sparsity,
            block=block,
            dtype=dtype,
            param_dtype=param_dtype,
            seed=seed,
            rngs=rngs,
        )
        self.recurrent = _Condensed(
            (hidden_features, width), sparsity, block, False, dtype, param_dtype, seed, rngs, 1
        )

    def initial_carry(self, lanes: int, dtype: jax.typing.DTypeLike = jnp.float32) -> jax.Array:
        """The state before the first step: zeros (lanes, state)."""
        return jnp.zeros((lanes, self.parts * self.hidden_features), dtype)

    def __call__(
        self,
        x_BxTxI: jax.Array,
        carry_BxS: jax.Array | None = None,
        keep_BxT: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Outputs and the state after the last step.

        Args:
          x_BxTxI: What comes in, (lanes, time, in_features).
          carry_BxS: The state before the first step; zeros if None.
          keep_BxT: 0 where the state is forgotten before the step, as at the first byte of a
            text, else 1; None for nowhere.

        Returns:
          (lanes, time, hidden_features), and the state (lanes, state).
        """
        projected_TxBxG = self.input(x_BxTxI).swapaxes(0, 1)
        time, lanes, _ = projected_TxBxG.shape
        dtype = projected_TxBxG.dtype
        carry = self.initial_carry(lanes) if carry_BxS is None else carry_BxS
        keep = jnp.ones((lanes, time), dtype) if keep_BxT is None else keep_BxT
        out_TxBxU, last_BxS = type(self).scan(
            tuple(jnp.split(projected_TxBxG, self.gates, axis=2)),
            carry.astype(dtype),
            (self.recurrent.bound(),),
            keep.T[:, :, None].astype(dtype),
        )
        return out_TxBxU.swapaxes(0, 1), last_BxS


class SparseGRU(_Recurrent):
    """A GRU over sequences with condensed kernels: as `nnx.RNN(nnx.GRUCell(...))`.

    Its kernels, `input/kernel` and `recurrent/kernel`, are each of the gates reset, update and
    candidate side by side, which so compete for blocks. Initial values are normal: an orthogonal
    kernel, as Flax draws, would have to be made dense.

    Args:
      in_features: Width of what comes in.
      hidden_features: Width of the state.
      sparsity: Fraction of blocks that are absent, of each kernel.
      block: Their size.
      dtype: Of the computation; None for that of the parameters and activations.
      param_dtype: Of the parameters.
      seed: Of the random blocks: another for each layer.
      rngs: Random keys for the initial values (stream `params`).

    Example:
      >>> from flax import nnx
      >>> import jax.numpy as jnp, rigl_optax
      >>> from rigl_optax.condensed.layers import SparseGRU, topologies
      >>> block = rigl_optax.Block(16, 16)
      >>> layer = SparseGRU(32, 64, sparsity=0.75, block=block, seed=1, rngs=nnx.Rngs(0))
      >>> outputs, carry = layer(jnp.ones((8, 5, 32)))
      >>> outputs.shape, carry.shape, list(topologies(layer))
      ((8, 5, 64), (8, 64), ['input/kernel', 'recurrent/kernel'])
    """

    gates = 3
    parts = 1
    scan = _recurrence.gru


class SparseLSTM(_Recurrent):
    """An LSTM over sequences with condensed kernels: as `nnx.RNN(nnx.OptimizedLSTMCell(...))`.

    As `SparseGRU`, with the gates input, forget, cell and output, and one bias in all, zero at
    first. The carry is the output and the cell side by side, (lanes, 2 * hidden_features).

    Args:
      in_features: As in `SparseGRU`, and so the others.
      hidden_features: Width of the output, and of the cell.
      sparsity: As in `SparseGRU`.
      block: As in `SparseGRU`.
      dtype: As in `SparseGRU`.
      param_dtype: As in `SparseGRU`.
      seed: As in `SparseGRU`.
      rngs: As in `SparseGRU`.

    Example:
      >>> from flax import nnx
      >>> import jax.numpy as jnp, rigl_optax
      >>> from rigl_optax.condensed.layers import SparseLSTM
      >>> block = rigl_optax.Block(16, 16)
      >>> layer = SparseLSTM(32, 64, sparsity=0.75, block=block, seed=1, rngs=nnx.Rngs(0))
      >>> outputs, carry = layer(jnp.ones((8, 5, 32)), layer.initial_carry(8))
      >>> outputs.shape, carry.shape
      ((8, 5, 64), (8, 128))
    """

    gates = 4
    parts = 2
    scan = _recurrence.lstm


def topologies(model: nnx.Module) -> dict[str, Topology]:
    """Of all condensed kernels of a model: `{path of the parameter: topology}`.

    For `condensed.rigl(...).init(weights, topologies)`, with `weights` the model's parameters as
    a pure tree. The model's own are then those of the start: `write` updates them.
    """
    found = {}
    for path, module in nnx.iter_modules(model):
        if isinstance(module, _Condensed):
            found["/".join(map(str, (*path, "kernel")))] = module.topology.get_value()
    return dict(sorted(found.items()))


def write(model: nnx.Module, weights: PyTree, topologies: dict[str, Topology]) -> None:
    """Puts trained weights and their topologies into a model, in place.

    Args:
      model: Of condensed layers.
      weights: A pure tree like the model's parameters.
      topologies: Of the state of the training.
    """
    nnx.update(model, weights)
    named = dict(_paths.flatten_with_paths(weights))
    for path, module in nnx.iter_modules(model):
        if isinstance(module, _Condensed):
            name = "/".join(map(str, (*path, "kernel")))
            if name not in named:
                raise ValueError(f"weights have no {name!r}, which the model has")
            module.topology.set_value(topologies[name])
