"""Flax NNX layers with condensed kernels. Needs Flax; the rest of `condensed` does not."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from rigl_optax import _paths
from rigl_optax._structures import UNSTRUCTURED, Block, Structures
from rigl_optax._types import PyTree, Seed
from rigl_optax.condensed import _conversion
from rigl_optax.condensed._initialization import random_topology, random_values
from rigl_optax.condensed._kernel import Kernel
from rigl_optax.condensed._topology import Topology
from rigl_optax.condensed.blocks import _recurrence
from rigl_optax.condensed.blocks._convolution import Padding, convolve


class Index(nnx.Variable):
    """The topology of a kernel. It is no `nnx.Param`, since it has no gradient."""


class _Condensed(nnx.Module):
    """The values of a condensed kernel, its topology, and a bias."""

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
        topology = random_topology(shape, sparsity, block, seed=seed, position=position)
        self.topology = Index(topology)
        self.kernel = nnx.Param(random_values(rngs.params(), topology, param_dtype))
        self.bias = nnx.Param(jnp.zeros(shape[-1], param_dtype)) if use_bias else None
        self.dtype = dtype

    def bound(self) -> Any:
        """Returns the kernel to multiply by."""
        kernel = self.kernel.get_value()
        # In training `condensed.bind` has put the kernel in the place of its values.
        if isinstance(kernel, Kernel):
            return kernel
        return self.topology.get_value().bind(kernel)

    def in_dtype(self, x: jax.Array) -> tuple[jax.Array, Any]:
        """Returns activations and kernel in the dtype of the computation."""
        kernel = self.bound()
        if self.dtype is None:
            return x, kernel
        return x.astype(self.dtype), kernel.astype(self.dtype)

    def add_bias(self, y: jax.Array) -> jax.Array:
        """Adds the bias, if there is one."""
        return y if self.bias is None else y + self.bias[...].astype(y.dtype)


class SparseLinear(_Condensed):
    """A linear map of the last axis with a condensed kernel: as `nnx.Linear`.

    Args:
      in_features: Width of the input.
      out_features: Width of the output.
      sparsity: Fraction of the blocks that are absent.
      block: Structure of the kernel.
      use_bias: Whether there is a bias, zero at first.
      dtype: Of the computation; None for that of the parameters and activations.
      param_dtype: Of the parameters.
      seed: Of the random blocks; give each layer another one.
      rngs: Random keys for the initial values (stream `params`).

    Examples:
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
        """Maps [..., in_features] to [..., out_features]."""
        x, kernel = self.in_dtype(x)
        return self.add_bias(x @ kernel)


class _Converted(SparseLinear):
    """A trained `nnx.Linear` with the stored entries of its kernel."""

    def __init__(self, layer: nnx.Linear, kernel: jax.Array, topology: Any) -> None:
        self.topology, self.kernel = Index(topology), nnx.Param(kernel)
        self.bias, self.dtype = layer.bias, layer.dtype


def condense(
    model: nnx.Module, params: PyTree, masks: PyTree, structure: Structures = UNSTRUCTURED
) -> nnx.Module:
    """Puts trained weights into a model, and condenses its linear layers, in place.

    Args:
      model: Any NNX model. Its sparse `nnx.Linear` layers are replaced by condensed ones; all
        other kernels stay dense.
      params: Its parameters, by path, as `export.read(...).params`.
      masks: Bool, by path, as `export.read(...).masks`.
      structure: As in `condensed.condense`; by default single weights.

    Returns:
      The model.

    Raises:
      ValueError: If params are not those of the model, or masks not those of params.

    Examples:
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


class Start(NamedTuple):
    """A model split for condensed training, as `initialize` makes it.

    Attributes:
      graphdef: The model's static part.
      weights: Its parameters, a pure tree: stored values in place of sparse kernels.
      rest: Its other variables, a pure tree.
      topologies: `{path: topology}` of the sparse kernels.
    """

    graphdef: nnx.GraphDef[Any]
    weights: PyTree
    rest: PyTree
    topologies: dict[str, Topology]


def initialize(
    make_model: Callable[[], nnx.Module],
    sparsity: Callable[[PyTree], Mapping[str, float]],
    block: Block,
    *,
    key: jax.Array,
    seed: Seed = 0,
) -> Start:
    """Draws a model whose sparse kernels are stored as blocks, and never makes one dense.

    Its layers must take a `BlockSparse` for a kernel, as those of `rigl_optax.models` do. Use it
    for networks that would not fit into memory: `condense` and `extract` start from dense kernels.
    Stored values are those of `random_values`, whatever the model's own initialization is; all
    other parameters are the model's own.

    Args:
      make_model: Makes the model; the draws of its sparse kernels are compiled away.
      sparsity: From shapes of parameters to `{path: sparsity}`, as `rigl_optax.uniform(0.9)`.
      block: Structure of the sparse kernels.
      key: For the stored values.
      seed: Of the topologies.

    Returns:
      A `Start`; `nnx.merge(graphdef, condensed.bind(weights, topologies), rest)` is the model.

    Raises:
      ValueError: If the block does not divide a kernel.

    Examples:
      >>> import jax, rigl_optax
      >>> from flax import nnx
      >>> from rigl_optax.condensed import layers
      >>> from rigl_optax.models.lenet import LeNet
      >>> start = layers.initialize(
      ...     lambda: LeNet((8, 8), 4, (32,), rngs=nnx.Rngs(0)),
      ...     rigl_optax.uniform(0.5, overrides={"layers/1": 0.0}),
      ...     rigl_optax.Block(16, 16),
      ...     key=jax.random.key(0),
      ... )
      >>> {path: t.values_shape for path, t in start.topologies.items()}
      {'layers/0/kernel': (4, 16, 16)}
    """
    outline = nnx.eval_shape(make_model)
    shapes = nnx.to_pure_dict(nnx.state(outline, nnx.Param))
    named = _paths.flatten_with_paths(shapes)
    sparsities = sparsity(shapes)
    found: dict[str, Topology] = {
        path: random_topology(tuple(leaf.shape), sparsities[path], block, seed=seed, position=i)
        for i, (path, leaf) in enumerate(named)
        if sparsities.get(path)
    }

    @jax.jit
    def others() -> tuple[dict[str, jax.Array], PyTree]:
        model = make_model()
        leaves = _paths.flatten_with_paths(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
        rest = nnx.to_pure_dict(nnx.state(model, nnx.Not(nnx.Param)))
        return {path: x for path, x in leaves if path not in found}, rest

    dense, rest = others()

    def weight(index: int, path: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if path not in found:
            return dense[path]
        return random_values(jax.random.fold_in(key, index), found[path], leaf.dtype)

    weights = [weight(i, path, leaf) for i, (path, leaf) in enumerate(named)]
    params = jax.tree.unflatten(jax.tree.structure(shapes), weights)
    return Start(nnx.graphdef(outline), params, rest, found)


class SparseConv(_Condensed):
    """A convolution of images with a condensed kernel: as `nnx.Conv`.

    A block has all taps of the window for some input and output channels.

    Args:
      in_features: Channels of the input.
      out_features: Channels of the output.
      kernel_size: Height and width of the window.
      sparsity: Fraction of the blocks that are absent.
      block: Structure of the kernel, in channels.
      strides: Of the window, along height and width.
      padding: As in `convolve`.
      use_bias: Whether there is a bias, zero at first.
      dtype: Of the computation; None for that of the parameters and activations.
      param_dtype: Of the parameters.
      seed: Of the random blocks: another for each layer.
      rngs: Random keys for the initial values (stream `params`).

    Examples:
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
        """Maps [batch, height, width, in_features] to [..., out_features]."""
        x, kernel = self.in_dtype(x)
        return self.add_bias(convolve(x, kernel, strides=self.strides, padding=self.padding))


class _Recurrent(nnx.Module):
    """A cell over sequences; inputs are projected for all steps at once."""

    gates: ClassVar[int]
    parts: ClassVar[int]  # arrays that the state consists of, each of `hidden_features`
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
        """Returns the state before the first step: zeros (lanes, state)."""
        return jnp.zeros((lanes, self.parts * self.hidden_features), dtype)

    def __call__(
        self,
        x_BxTxI: jax.Array,
        carry_BxS: jax.Array | None = None,
        keep_BxT: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Runs the cell over a sequence.

        Args:
          x_BxTxI: Inputs, (lanes, time, in_features).
          carry_BxS: The state before the first step; zeros if None.
          keep_BxT: 0 where the state is forgotten before the step, as at the first byte of a
            text, else 1; None if it is never forgotten.

        Returns:
          Outputs (lanes, time, hidden_features), and the last state (lanes, state).
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

    Each of its kernels, `input/kernel` and `recurrent/kernel`, holds the gates reset, update and
    candidate side by side, so the gates compete for blocks. Initial values are normal: to draw
    an orthogonal kernel, as Flax does, a dense one would have to be made.

    Args:
      in_features: Width of the input.
      hidden_features: Width of the state.
      sparsity: Fraction of the blocks of each kernel that are absent.
      block: Structure of both kernels.
      dtype: Of the computation; None for that of the parameters and activations.
      param_dtype: Of the parameters.
      seed: Of the random blocks; give each layer another one.
      rngs: Random keys for the initial values (stream `params`).

    Examples:
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

    As `SparseGRU`, with the gates input, forget, cell and output, and a single bias, zero at
    first. The carry is the output and the cell side by side, (lanes, 2 * hidden_features).

    Args:
      in_features: As in `SparseGRU`.
      hidden_features: Width of the output, and of the cell.
      sparsity: As in `SparseGRU`.
      block: As in `SparseGRU`.
      dtype: As in `SparseGRU`.
      param_dtype: As in `SparseGRU`.
      seed: As in `SparseGRU`.
      rngs: As in `SparseGRU`.

    Examples:
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
    """Collects the topologies of a model: `{path of the kernel: topology}`.

    Pass them to `condensed.rigl(...).init(weights, topologies)`, with `weights` the model's
    parameters as a pure tree. Training does not change those in the model; `write` does.
    """
    found = {}
    for path, module in nnx.iter_modules(model):
        if isinstance(module, _Condensed):
            found["/".join(map(str, (*path, "kernel")))] = module.topology.get_value()
    return dict(sorted(found.items()))


def write(model: nnx.Module, weights: PyTree, topologies: dict[str, Topology]) -> None:
    """Puts trained weights and their topologies into a model, in place.

    Args:
      model: A model with condensed layers.
      weights: A pure tree like the model's parameters.
      topologies: Those of the training's state.

    Raises:
      ValueError: If a kernel of the model is missing in the weights.
    """
    nnx.update(model, weights)
    named = dict(_paths.flatten_with_paths(weights))
    for path, module in nnx.iter_modules(model):
        if isinstance(module, _Condensed):
            name = "/".join(map(str, (*path, "kernel")))
            if name not in named:
                raise ValueError(f"weights have no {name!r}, which the model has")
            module.topology.set_value(topologies[name])
