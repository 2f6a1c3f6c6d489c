"""Single weights in compressed sparse rows (CSR), where the backend has a kernel for them.

The CPU has one, through `jax.experimental.sparse`, which is frozen upstream: nothing else here
uses it. Elsewhere a product makes its kernel dense for as long as it takes.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec

from rigl_optax.condensed import _devices
from rigl_optax.condensed._kernel import common_dtype
from rigl_optax.condensed._product import accumulator

# Entries of the dense gradient that are there at once: what stays in the second cache level.
_AT_ONCE = 1 << 19
# Below this density the stored entries of a gradient are computed one by one, above it all are
# and most are thrown away. Of 2048x2048 weights and 256 examples one by one took twice as long at
# a density of .05, and two thirds of the time at .02.
_SPARSE = 0.03


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["rows", "cols", "starts", "order", "ordered_cols", "row_starts"],
    meta_fields=["shape", "widest"],
)
@dataclasses.dataclass(frozen=True)
class CSRTopology:
    """The weights that an unstructured layer has, sorted by output and then by input.

    Attributes:
      rows: int32 [n]: input of each weight.
      cols: int32 [n]: output of each, ascending.
      starts: int32 [out + 1]: where the weights of each output begin.
      order: int32 [n]: the same weights sorted by input, then by output.
      ordered_cols: int32 [n]: output of each, in that order.
      row_starts: int32 [in + 1]: where, in that order, the weights of each input begin.
      shape: Of the dense kernel, (in, out).
      widest: The most weights of a chunk of outputs, for static shapes.
    """

    rows: jax.Array
    cols: jax.Array
    starts: jax.Array
    order: jax.Array
    ordered_cols: jax.Array
    row_starts: jax.Array
    shape: tuple[int, ...]
    widest: int

    @property
    def values_shape(self) -> tuple[int, ...]:
        """Shape of the stored values: (n,)."""
        return self.rows.shape

    @property
    def density(self) -> float:
        """Stored weights of all."""
        return self.rows.shape[0] / max(1, self.shape[0] * self.shape[1])

    def mask(self) -> jax.Array:
        """Bool, of the shape of the dense kernel."""
        return jnp.zeros(self.shape, bool).at[self.rows, self.cols].set(True)

    def extract(self, dense: jax.Array) -> jax.Array:
        """The stored weights of a dense array, [n]."""
        return dense[self.rows, self.cols]


def csr_topology(mask: Any) -> CSRTopology:
    """The topology of an unstructured mask, made on the host.

    Args:
      mask: Bool, (in, out).

    Returns:
      Where its True entries are.

    Raises:
      ValueError: If it has not two axes.
    """
    whole = np.asarray(mask)
    if whole.ndim != 2:
        raise ValueError(f"a mask of shape {whole.shape}: CSR is for kernels of two axes")
    inputs, outputs = whole.shape
    cols, rows = np.nonzero(whole.T)

    def starts(ascending: np.ndarray, bound: int) -> np.ndarray:
        return np.searchsorted(ascending, np.arange(bound + 1))

    order = np.lexsort((cols, rows))
    counts = np.bincount(cols // _chunk(inputs, outputs), minlength=1)
    arrays = {
        "rows": rows,
        "cols": cols,
        "starts": starts(cols, outputs),
        "order": order,
        "ordered_cols": cols[order],
        "row_starts": starts(rows[order], inputs),
    }
    placed = {name: jnp.asarray(x, jnp.int32) for name, x in arrays.items()}
    return CSRTopology(**placed, shape=(inputs, outputs), widest=int(counts.max()))


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["values", "topology"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class CSR:
    """Single weights and where they are: `x @ kernel` is a product with the dense kernel.

    Gradients are those of the stored weights. There are no scores: such a kernel is deployed, or
    trained as it is, not rewired.

    Attributes:
      values: Floating, [n].
      topology: Where they are.

    Example:
      >>> import jax.numpy as jnp, numpy as np
      >>> from rigl_optax.condensed import CSR, csr_topology
      >>> topology = csr_topology(np.eye(4, 3, dtype=bool))
      >>> kernel = CSR(jnp.arange(1.0, 4.0), topology)
      >>> (jnp.ones((2, 4)) @ kernel).tolist(), int(topology.mask().sum())
      ([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]], 3)
    """

    values: jax.Array
    topology: CSRTopology

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the dense kernel."""
        return self.topology.shape

    def dense(self) -> jax.Array:
        """The dense kernel, zero where there is no weight."""
        zeros = jnp.zeros(self.shape, self.values.dtype)
        return zeros.at[self.topology.rows, self.topology.cols].set(self.values)

    # NumPy arrays are to leave the product to us.
    __array_priority__ = 1000

    def __rmatmul__(self, x: jax.Array) -> jax.Array:
        """[..., in] to [..., out]."""
        x, (inputs, outputs) = jnp.asarray(x), self.shape
        if x.ndim < 1 or x.shape[-1] != inputs:
            raise ValueError(f"activations of shape {x.shape} do not fit a kernel of {self.shape}")

        def product(x: jax.Array, kernel: CSR) -> jax.Array:
            dtype = common_dtype(x, kernel.values)
            x_BxI = x.astype(dtype).reshape(-1, inputs)
            y_BxO = _multiply(kernel.values.astype(dtype), kernel.topology, x_BxI)
            return y_BxO.reshape(*x.shape[:-1], outputs)

        cut = _devices.examples(x, x.ndim - 1)
        if cut is not None:
            product = _devices.by_parts(product, (cut, PartitionSpec()), cut)
        return product(x, self)


@jax.custom_vjp
def _multiply(values: jax.Array, topology: CSRTopology, x_BxI: jax.Array) -> jax.Array:
    t, (inputs, outputs) = topology, topology.shape
    return _product((outputs, inputs), values, t.rows, t.starts, t.cols, x_BxI.T).T


def _forward(values: jax.Array, topology: CSRTopology, x_BxI: jax.Array) -> tuple[jax.Array, Any]:
    return _multiply(values, topology, x_BxI), (values, topology, x_BxI)


def _backward(saved: Any, dy_BxO: jax.Array) -> tuple[Any, ...]:
    (values, t, x_BxI), dy_OxB = saved, dy_BxO.T
    by_input = values[t.order], t.ordered_cols, t.row_starts, t.rows[t.order]
    dx = _product(t.shape, *by_input, dy_OxB).T
    sampled = _one_by_one if t.density < _SPARSE else _by_chunks
    dvalues = sampled(t, x_BxI, dy_OxB).astype(values.dtype)
    return _devices.summed(dvalues, values), None, _devices.summed(dx, x_BxI)


_multiply.defvjp(_forward, _backward)


def _product(
    shape: tuple[int, int],
    values: jax.Array,
    indices: jax.Array,
    starts: jax.Array,
    lines: jax.Array,
    x: jax.Array,
) -> jax.Array:
    """A sparse matrix [m, n], its column `indices` sorted by `lines`, times x [n, batch]."""
    dtype = accumulator(values, x)
    values, wide = values.astype(dtype), x.astype(dtype)

    def made_dense(
        values: jax.Array, indices: jax.Array, starts: jax.Array, lines: jax.Array, x: jax.Array
    ) -> jax.Array:
        return jnp.zeros(shape, values.dtype).at[lines, indices].set(values) @ x

    def by_kernel(
        values: jax.Array, indices: jax.Array, starts: jax.Array, lines: jax.Array, x: jax.Array
    ) -> jax.Array:
        matrix = _upstream()
        if matrix is None:
            return made_dense(values, indices, starts, lines, x)
        # Its result has forgotten that it differs from device to device.
        return _devices.differing(matrix((values, indices, starts), shape=shape) @ x, values, x)

    # The kernel knows no batch of matrices: a loop over it.
    chosen = jax.custom_batching.sequential_vmap(
        lambda *args: lax.platform_dependent(*args, cpu=by_kernel, default=made_dense)
    )
    return chosen(values, indices, starts, lines, wide).astype(x.dtype)


def _upstream() -> Any:
    """JAX's class of CSR matrices; None once it is gone. Slow to import, and seldom needed."""
    try:
        from jax.experimental.sparse import BCSR
    except ImportError:
        return None
    return BCSR


def _chunk(inputs: int, outputs: int) -> int:
    """Outputs of which the dense gradient is there at once."""
    return max(1, min(outputs, _AT_ONCE // max(1, inputs)))


def _one_by_one(t: CSRTopology, x_BxI: jax.Array, dy_OxB: jax.Array) -> jax.Array:
    """The stored entries of the dense gradient, [n]."""
    dtype, (number,), x_IxB = accumulator(x_BxI, dy_OxB), t.values_shape, x_BxI.T
    size = min(max(1, 2 * _AT_ONCE // max(1, x_IxB.shape[1])), max(1, number))

    def some(places: tuple[jax.Array, jax.Array]) -> jax.Array:
        rows, cols = places
        return jnp.sum(x_IxB[rows].astype(dtype) * dy_OxB[cols].astype(dtype), 1)

    places = tuple(jnp.pad(a, (0, -number % size)).reshape(-1, size) for a in (t.rows, t.cols))
    return lax.map(some, places).reshape(-1)[:number]


def _by_chunks(t: CSRTopology, x_BxI: jax.Array, dy_OxB: jax.Array) -> jax.Array:
    """The same, out of the dense gradient of some outputs at a time."""
    dtype, (inputs, outputs), (number,) = accumulator(x_BxI, dy_OxB), t.shape, t.values_shape
    size = _chunk(inputs, outputs)
    dy = jnp.pad(dy_OxB, ((0, -outputs % size), (0, 0))).reshape(-1, size, dy_OxB.shape[1])
    firsts = jnp.arange(dy.shape[0], dtype=jnp.int32) * size
    # A chunk has at most `widest` weights; what is read beyond its own is written again later.
    rows, cols = (jnp.pad(a, (0, t.widest)) for a in (t.rows, t.cols))

    def chunk(found: jax.Array, each: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        dy_CxB, first = each
        dense_CxI = jnp.matmul(dy_CxB, x_BxI, preferred_element_type=dtype)
        start = t.starts[first]
        own_rows, own_cols = (lax.dynamic_slice_in_dim(a, start, t.widest) for a in (rows, cols))
        part = dense_CxI.at[own_cols - first, own_rows].get(mode="clip")
        return lax.dynamic_update_slice_in_dim(found, part, start, 0), None

    nothing = _devices.zeros((number + t.widest,), dtype, x_BxI, dy_OxB)
    return lax.scan(chunk, nothing, (dy, firsts))[0][:number]
