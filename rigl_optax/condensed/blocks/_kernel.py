"""A condensed kernel of blocks, and its product with activations."""

import dataclasses
import functools
import math
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from rigl_optax._structures import Block
from rigl_optax._xla import _sharding
from rigl_optax.condensed import _devices
from rigl_optax.condensed._dot import common_dtype
from rigl_optax.condensed._kernel import Kernel
from rigl_optax.condensed.blocks import _features_first, _product, _table

if TYPE_CHECKING:  # whose `bind` makes kernels, and so imports this module
    from rigl_optax.condensed.blocks._topology import BlockTopology


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["values", "topology", "probe"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class BlockSparse(Kernel):
    r"""Stored blocks and where they are: `x @ kernel` is a product with the dense kernel.

    Gradients with respect to `values` are those of the stored weights alone. The gradient with
    respect to `probe`, zeros of the shape of the grid that change nothing, is *defined* to be
    the score of each block of the dense gradient,

    $$
    \mathrm{score}_{io} = \mathrm{pool}(x_i^\top \, \partial L / \partial y_o)
    $$

    which is computed for some rows or columns of blocks at a time and pooled at once. Growth needs
    it, on rewiring steps alone; a program that does not ask for this gradient does not compute it.
    Where a kernel is used several times, the scores of its uses are added up: an upper bound of
    the score of the summed gradient.

    Attributes:
      values: Floating, [blocks, *window, rows, cols].
      topology: A `BlockTopology`: where the blocks are.
      probe: float32 zeros, of the shape of the grid; None to leave it out.

    Examples:
      >>> import jax.numpy as jnp, rigl_optax
      >>> from rigl_optax.condensed import BlockSparse, random_topology
      >>> topology = random_topology((8, 6), 0.5, rigl_optax.Block(4, 3))
      >>> kernel = BlockSparse(jnp.ones(topology.values_shape), topology)
      >>> (jnp.ones((2, 8)) @ kernel).shape, float(kernel.dense().sum())
      ((2, 6), 24.0)
    """

    values: jax.Array
    topology: "BlockTopology"
    probe: jax.Array | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the dense kernel."""
        return self.topology.shape

    @property
    def T(self) -> "BlockSparse":
        """The transposed kernel, of the same values: they are copied in another order."""
        topology, order = self.topology.transposed()
        values = self.values[order].reshape(-1, *self.values.shape[-2:]).swapaxes(1, 2)
        return BlockSparse(values, topology, None if self.probe is None else self.probe.T)

    def __rmatmul__(self, x: jax.Array) -> jax.Array:
        """Multiplies activations: `matmul`."""
        return matmul(x, self)

    def astype(self, dtype: jax.typing.DTypeLike) -> "BlockSparse":
        """Returns the kernel with values of another dtype."""
        return BlockSparse(self.values.astype(dtype), self.topology, self.probe)

    def dense(self) -> jax.Array:
        """Returns the dense kernel, zero where there is no block."""
        topology = self.topology
        (inputs, outputs), block = topology.grid, topology.block
        window = topology.shape[:-2]
        grid = jnp.zeros((inputs, outputs, *self.values.shape[1:]), self.values.dtype)
        # Under explicit axes values may be cut along their blocks, the grid is not.
        grid = grid.at[topology.rows, topology.cols].set(_sharding.whole(self.values))
        # [in, out, *window, r, c] -> [*window, in, r, out, c]
        taps = tuple(range(2, 2 + len(window)))
        wide = grid.transpose(*taps, 0, 2 + len(window), 1, 3 + len(window))
        whole = wide.reshape(*window, inputs * block.rows, outputs * block.cols)
        return whole[..., : topology.shape[-2], : topology.shape[-1]]


def matmul(x: jax.Array, kernel: BlockSparse, *, features_first: bool = False) -> jax.Array:
    """Multiplies activations by a condensed kernel.

    Args:
      x: [..., in]; or [in, batch].
      kernel: Of a linear layer, or of a 1x1 convolution.
      features_first: Whether features are the first of two axes, in `x` and in the result. On
        the CPU that is faster where all rows of a batch fit into the cache: use it for a chain
        of linear layers.

    Returns:
      [..., out]; or [out, batch].

    Raises:
      ValueError: If shapes do not fit.
    """
    topology, x = kernel.topology, jnp.asarray(x)
    inputs, outputs = topology.shape[-2:]
    axis = 0 if features_first else x.ndim - 1
    if any(n != 1 for n in topology.shape[:-2]):
        raise ValueError(f"a kernel of shape {topology.shape} is a convolution's: use convolve")
    if x.ndim < 1 or (features_first and x.ndim != 2) or x.shape[axis] != inputs:
        raise ValueError(f"activations of shape {x.shape} do not fit a kernel of {topology.shape}")

    def product(x: jax.Array, kernel: BlockSparse) -> jax.Array:
        dtype, (topology, block) = common_dtype(x, kernel.values), (kernel.topology, spec.block)
        values = kernel.values.astype(dtype).reshape(-1, block.rows, block.cols)
        x = x.astype(dtype)
        part = x if features_first else x.reshape(math.prod(x.shape[:-1]), inputs)
        y = _multiply(spec, values, topology.rows, topology.cols, part, kernel.probe)
        return y if features_first else y.reshape(*x.shape[:-1], outputs)

    chosen = _table.chosen(topology.block, common_dtype(x, kernel.values))
    spec = Spec(topology.block, topology.shape, features_first, chosen)
    cut = _devices.examples(x, axis)
    if cut is not None:
        product = _devices.by_parts(product, (cut, PartitionSpec()), cut)
    return product(x, kernel)


class Spec(NamedTuple):
    """The static part of a product.

    Attributes:
      block: Structure of the kernel.
      shape: Of the dense kernel.
      features_first: Layout of activations.
      products: Which product each platform uses; of activations with features last.
    """

    block: Block
    shape: tuple[int, ...]
    features_first: bool = False
    products: tuple[_table.Product, ...] = ("batched",)

    @property
    def grid(self) -> tuple[int, int]:
        """Numbers of input blocks and output blocks."""
        inputs, outputs = self.block.grid(self.shape, "a layer")
        return inputs, outputs

    def sizes(self) -> jax.Array:
        """Returns how many weights of each block of the grid lie within the layer."""
        return jnp.asarray(self.block.group_sizes(self.shape), jnp.int32)

    def score(self, *axes: int) -> _product.Score:
        """Returns `score(gradient, sizes)` for gradients in which `axes` run within a block."""
        return lambda gradient, sizes: self.block.score(gradient, axes, sizes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _multiply(
    spec: Spec,
    values: jax.Array,
    rows: jax.Array,
    cols: jax.Array,
    x: jax.Array,
    probe: jax.Array | None,
) -> jax.Array:
    return _multiply_forward(spec, values, rows, cols, x, probe)[0]


def _multiply_forward(
    spec: Spec,
    values: jax.Array,
    rows: jax.Array,
    cols: jax.Array,
    x: jax.Array,
    probe: jax.Array | None,
) -> tuple[jax.Array, Any]:
    # This computes the product itself and does not call `_multiply`, whose rule is for reverse mode
    # alone: so JAX can differentiate forward through a gradient (Hessian-vector products).
    saved, (inputs, outputs), dtype = (values, rows, cols, x, probe), spec.grid, x.dtype
    if not spec.features_first:
        args, features = (values, rows, cols, x), spec.shape[-1]
        return _table.apply("forward", spec.products, args, features).astype(dtype), saved
    x = _blocked(x, inputs, spec.block.rows)
    y = _flat(_features_first.forward(values, rows, cols, x, outputs), spec.shape[-1])
    return y.astype(dtype), saved


def _multiply_backward(spec: Spec, saved: Any, dy: jax.Array) -> tuple[Any, ...]:
    values, rows, cols, x, probe = saved
    (inputs, outputs), features, dtype = spec.grid, spec.shape[-2], x.dtype
    block = spec.block.rows, spec.block.cols
    dprobe: jax.Array | None = None
    if spec.features_first:
        x, dy = _blocked(x, inputs, block[0]), _blocked(dy, outputs, block[1])
        dx = _flat(_features_first.backward_input(values, rows, cols, dy, inputs), features)
        dvalues = _features_first.backward_values(rows, cols, x, dy, block)
        if probe is not None:
            dprobe = _features_first.scores(x, dy, spec.sizes(), spec.score(1, 2), probe)
    else:
        dx, dvalues = _table.apply("backward", spec.products, (values, rows, cols, x, dy))
        if probe is not None:
            dprobe = _product.scores(x, dy, spec.sizes(), block, spec.score(0, 2), probe)
    if dprobe is not None:
        dprobe = dprobe.astype(probe.dtype)
    dvalues, dx = _devices.summed(dvalues, values), _devices.summed(dx.astype(dtype), saved[3])
    return dvalues.astype(values.dtype), None, None, dx, dprobe


_multiply.defvjp(_multiply_forward, _multiply_backward)


def _blocked(x: jax.Array, blocks: int, size: int) -> jax.Array:
    """Turns [features, batch] into [blocks, size, batch], with zeros beyond the edge."""
    missing = blocks * size - x.shape[0]
    padded = jnp.pad(x, ((0, missing), (0, 0))) if missing else x
    return padded.reshape(blocks, size, x.shape[1])


def _flat(x: jax.Array, features: int) -> jax.Array:
    """Inverts `_blocked`."""
    return x.reshape(x.shape[0] * x.shape[1], x.shape[2])[:features]
