"""A condensed kernel of single weights in compressed sparse rows (CSR), and its product.

The CPU backend has such a product, which JAX reaches through `jax.experimental.sparse`. That module
is frozen upstream, so this is the only one that imports it. On other backends, or should it go,
each product makes its kernel dense for as long as it takes: right, and no faster.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from rigl_optax._ranking import _top_k
from rigl_optax.condensed import _devices
from rigl_optax.condensed._dot import accumulator, common_dtype, dot
from rigl_optax.condensed._kernel import Kernel
from rigl_optax.condensed.single import _candidates

if TYPE_CHECKING:  # whose `bind` makes kernels, and so imports this module
    from rigl_optax.condensed.single._csr_topology import CSRTopology

# Entries of the dense gradient that exist at once: 2 MB, which stays in the second cache level.
_AT_ONCE = 1 << 19
# Below this density the gradient is computed for the stored weights one by one; above it for all
# weights, most of which are thrown away. With 2048x2048 weights and 256 examples (the layer of
# `benchmarks/condensed_csr.py`) one by one took twice as long at a density of .05, and two thirds
# of the time at .02.
_ONE_BY_ONE_BELOW = 0.03
_MATMUL = (((1,), (0,)), ((), ()))


class Probe(NamedTuple):
    """Zeros that change nothing, whose gradients are *defined* to be what growth needs.

    Gradients are arrays of floats, so rows and columns are too; that float32 holds them exactly is
    checked at `init`. Where a kernel is used several times, JAX adds up the gradients of its uses.
    The sum of two lists of places is no list of places: the checksum tells, and the topology stays.

    Attributes:
      stored: float32 [n]: gradient magnitudes of the stored weights, sorted by input and output.
      scores: float32 [k]: the k largest magnitudes of the dense gradient where there is no weight;
        k is the topology's `replaceable`.
      rows: float32 [k]: input of each.
      cols: float32 [k]: output of each.
      checksum: float32 scalar: a hash of rows and cols.
    """

    stored: jax.Array
    scores: jax.Array
    rows: jax.Array
    cols: jax.Array
    checksum: jax.Array


class SampleProbe(NamedTuple):
    """Zeros that change nothing: weights at the positions of a sample.

    Their gradients are those of any weight, so a kernel may be used several times.

    Attributes:
      scores: float32 [k]: of each position, in the order of `Sample.places`.
    """

    scores: jax.Array


def probe(topology: "CSRTopology") -> Probe | SampleProbe:
    """Returns the zeros for a kernel."""
    number = topology.replaceable
    if topology.sample is not None:
        return SampleProbe(jnp.zeros(number, jnp.float32))
    shapes = (topology.number,), (number,), (number,), (number,), ()
    return Probe(*(jnp.zeros(shape, jnp.float32) for shape in shapes))


def checksum(rows: jax.Array, cols: jax.Array) -> jax.Array:
    """Hashes the places of candidates: if their gradients were summed or averaged, no hash fits."""
    mixed = jnp.uint32(0x9E3779B1) * rows.astype(jnp.uint32) ^ cols.astype(jnp.uint32)
    mixed = (mixed ^ (mixed >> 15)) * jnp.uint32(0x85EBCA77)
    total = jnp.sum(mixed ^ (mixed >> 13), dtype=jnp.uint32) ^ jnp.uint32(0xC2B2AE3D)
    return (total >> 8).astype(jnp.float32)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["values", "topology", "probe"],
    meta_fields=["is_portable"],
)
@dataclasses.dataclass(frozen=True)
class CSR(Kernel):
    """Single weights and where they are: `x @ kernel` is a product with the dense kernel.

    Gradients with respect to `values` are those of the stored weights alone. Those with respect to
    `probe` are *defined* to be the largest entries of the dense gradient where no weight is stored
    (`Probe`), for growth: on rewiring steps alone the backward pass computes that gradient, for
    some inputs at a time, and keeps the largest. A kernel that is to be rewired must be used
    exactly once in the loss, and not in a scan or under `vmap`.

    Attributes:
      values: Floating, [n].
      topology: A `CSRTopology`: where the weights are.
      probe: Zeros, or None to leave them out.
      is_portable: Whether products do without the CPU's own (`portable`).

    Examples:
      >>> import jax.numpy as jnp, numpy as np
      >>> from rigl_optax.condensed import CSR, csr_topology
      >>> topology = csr_topology(np.eye(4, 3, dtype=bool))
      >>> kernel = CSR(jnp.arange(1.0, 4.0), topology)
      >>> (jnp.ones((2, 4)) @ kernel).tolist(), int(topology.dense_mask().sum())
      ([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]], 3)
    """

    values: jax.Array
    topology: "CSRTopology"
    probe: Probe | SampleProbe | None = None
    is_portable: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the dense kernel."""
        return self.topology.shape

    def dense(self) -> jax.Array:
        """Returns the dense kernel, zero where there is no weight."""
        zeros = jnp.zeros(self.shape, self.values.dtype)
        return zeros.at[self.topology.rows, self.topology.cols].set(self.values)

    def astype(self, dtype: jax.typing.DTypeLike) -> "CSR":
        """Returns the kernel with values of another dtype."""
        return dataclasses.replace(self, values=self.values.astype(dtype))

    def portable(self) -> "CSR":
        """Returns the kernel for `jax.export`, which cannot serialize the CPU's sparse product.

        Each product makes its kernel dense for as long as it takes, as on accelerators: right,
        and no faster than a dense one. The stored weights stay small.
        """
        return dataclasses.replace(self, is_portable=True)

    @property
    def T(self) -> "CSR":
        """The transposed kernel, of the same values: they are copied in another order."""
        if self.probe is not None:
            raise ValueError(
                "a transposed CSR kernel gives no scores for growth: leave the probe out "
                "(value_and_grad in place of value_grad_and_scores)"
            )
        values, topology = self.values[self.topology.order], self.topology.transposed()
        return CSR(values, topology, None, self.is_portable)

    def __rmatmul__(self, x: jax.Array) -> jax.Array:
        """Multiplies activations, [..., in] to [..., out]."""
        x, (inputs, outputs) = jnp.asarray(x), self.shape
        if x.ndim < 1 or x.shape[-1] != inputs:
            raise ValueError(f"activations of shape {x.shape} do not fit a kernel of {self.shape}")

        def product(x: jax.Array, kernel: CSR) -> jax.Array:
            dtype = common_dtype(x, kernel.values)
            x_BxI = x.astype(dtype).reshape(math.prod(x.shape[:-1]), inputs)
            values = kernel.values.astype(dtype)
            y_BxO = _multiply(kernel.is_portable, values, kernel.topology, x_BxI, kernel.probe)
            return y_BxO.reshape(*x.shape[:-1], outputs)

        cut = _devices.examples(x, x.ndim - 1)
        if cut is not None:
            product = _devices.by_parts(product, (cut, PartitionSpec()), cut)
        return product(x, self)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _multiply(
    is_portable: bool,
    values: jax.Array,
    topology: "CSRTopology",
    x_BxI: jax.Array,
    probe: Probe | SampleProbe | None,
) -> jax.Array:
    return _forward(is_portable, values, topology, x_BxI, probe)[0]


def _forward(
    is_portable: bool,
    values: jax.Array,
    topology: "CSRTopology",
    x_BxI: jax.Array,
    probe: Probe | SampleProbe | None,
) -> tuple[jax.Array, Any]:
    t, (inputs, outputs) = topology, topology.shape
    by_output = values, t.rows, t.starts, t.cols
    y_BxO = _product(is_portable, (outputs, inputs), *by_output, x_BxI.T).T
    return y_BxO, (values, topology, x_BxI, probe)


def _backward(is_portable: bool, saved: Any, dy_BxO: jax.Array) -> tuple[Any, ...]:
    (values, t, x_BxI, probe), dy_OxB = saved, dy_BxO.T
    by_input = values[t.order], t.ordered_cols, t.row_starts, t.rows[t.order]
    dx = _product(is_portable, t.shape, *by_input, dy_OxB).T
    if t.density < _ONE_BY_ONE_BELOW:
        dvalues = _one_by_one(t.rows, t.cols, x_BxI, dy_OxB)
    else:
        dvalues = _by_chunks(t, x_BxI, dy_OxB)
    dprobe: Probe | SampleProbe | None = None
    if isinstance(probe, SampleProbe):
        rows, cols = jnp.divmod(t.sample.places(), t.shape[1])
        found = _one_by_one(rows, cols, x_BxI, dy_OxB).astype(jnp.float32)
        dprobe = SampleProbe(_devices.summed(found, probe.scores))
    elif probe is not None:
        stored = _devices.summed(dvalues, probe.stored)
        dprobe = _probe_gradient(
            t, jnp.abs(stored[t.order]).astype(jnp.float32), x_BxI, dy_BxO, probe
        )
    dvalues = _devices.summed(dvalues.astype(values.dtype), values)
    return dvalues, None, _devices.summed(dx, x_BxI), dprobe


_multiply.defvjp(_forward, _backward)


def _product(
    is_portable: bool,
    shape: tuple[int, int],
    values: jax.Array,
    indices: jax.Array,
    starts: jax.Array,
    lines: jax.Array,
    x: jax.Array,
) -> jax.Array:
    """Multiplies a sparse matrix [m, n] by x [n, batch].

    Args:
      is_portable: As in `CSR`.
      shape: (m, n).
      values: [k], sorted by row of the matrix.
      indices: int32 [k]: the column of each.
      starts: int32 [m + 1]: where the values of each row begin.
      lines: int32 [k]: the row of each.
      x: [n, batch].
    """
    dtype = accumulator(values, x)
    values, wide = values.astype(dtype), x.astype(dtype)

    def made_dense(
        values: jax.Array, indices: jax.Array, starts: jax.Array, lines: jax.Array, x: jax.Array
    ) -> jax.Array:
        return jnp.zeros(shape, values.dtype).at[lines, indices].set(values) @ x

    def by_kernel(
        values: jax.Array, indices: jax.Array, starts: jax.Array, lines: jax.Array, x: jax.Array
    ) -> jax.Array:
        matrix = None if is_portable else _upstream()
        if matrix is None:
            return made_dense(values, indices, starts, lines, x)
        # In a `shard_map` the type of its result lacks the axes over which its operands differ.
        return _devices.differing(matrix((values, indices, starts), shape=shape) @ x, values, x)

    # The CPU's product takes a single matrix, so `vmap` becomes a loop.
    chosen = jax.custom_batching.sequential_vmap(
        lambda *args: lax.platform_dependent(*args, cpu=by_kernel, default=made_dense)
    )
    return chosen(values, indices, starts, lines, wide).astype(x.dtype)


def _upstream() -> Any:
    """Returns JAX's class of CSR matrices; None once it is gone.

    Imported where it is needed, which is seldom, since that takes a while.
    """
    try:
        from jax.experimental.sparse import BCSR
    except ImportError:
        return None
    return BCSR


def _one_by_one(rows: jax.Array, cols: jax.Array, x_BxI: jax.Array, dy_OxB: jax.Array) -> jax.Array:
    """Computes the gradient of weights at n places, [n], as an inner product for each."""
    dtype, (number,), x_IxB = accumulator(x_BxI, dy_OxB), rows.shape, x_BxI.T
    size = min(max(1, 2 * _AT_ONCE // max(1, x_IxB.shape[1])), max(1, number))

    def some(places: tuple[jax.Array, jax.Array]) -> jax.Array:
        rows, cols = places
        return jnp.sum(x_IxB[rows].astype(dtype) * dy_OxB[cols].astype(dtype), 1)

    places = tuple(jnp.pad(a, (0, -number % size)).reshape(-1, size) for a in (rows, cols))
    return lax.map(some, places).reshape(-1)[:number]


def _by_chunks(t: "CSRTopology", x_BxI: jax.Array, dy_OxB: jax.Array) -> jax.Array:
    """Computes the gradient of the stored weights, [n], from dense ones of a few outputs."""
    dtype, (inputs, outputs), (number,) = accumulator(x_BxI, dy_OxB), t.shape, t.values_shape
    size = max(1, min(outputs, _AT_ONCE // max(1, inputs)))
    dy = jnp.pad(dy_OxB, ((0, -outputs % size), (0, 0)))
    dy = dy.reshape(-(-outputs // size), size, dy_OxB.shape[1])
    firsts = jnp.arange(dy.shape[0], dtype=jnp.int32) * size
    # A piece may reach beyond the weights of its chunk: the next chunk overwrites that part.
    rows, cols = (jnp.pad(a, (0, t.piece)) for a in (t.rows, t.cols))

    def chunk(found: jax.Array, each: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        dy_CxB, first = each
        dense_CxI = dot(dy_CxB, x_BxI, _MATMUL)

        def take(found: jax.Array, at: jax.Array) -> jax.Array:
            own_rows, own_cols = (lax.dynamic_slice_in_dim(a, at, t.piece) for a in (rows, cols))
            part = dense_CxI.at[own_cols - first, own_rows].get(mode="clip")
            return lax.dynamic_update_slice_in_dim(found, part, at, 0)

        stop = t.starts[jnp.minimum(first + size, outputs)]
        return t.by_pieces(t.starts[first], stop, take, found), None

    nothing = _devices.zeros((number + t.piece,), dtype, x_BxI, dy_OxB)
    return lax.scan(chunk, nothing, (dy, firsts))[0][:number]


def _probe_gradient(
    t: "CSRTopology", stored: jax.Array, x_BxI: jax.Array, dy_BxO: jax.Array, probe: Probe
) -> Probe:
    """Finds the largest entries of the dense gradient, computed for a few inputs at a time."""
    inputs, outputs = t.shape

    def scorer(size: int) -> Callable[[jax.Array], jax.Array]:
        x_IxB = jnp.pad(x_BxI.T, ((0, -inputs % size), (0, 0)))

        def scores_from(first: jax.Array) -> jax.Array:
            own_CxB = lax.dynamic_slice_in_dim(x_IxB, first, size)
            dense_CxO = dot(own_CxB, dy_BxO, _MATMUL)
            return _top_k.magnitude_scores(_devices.summed(dense_CxO, probe.scores))

        return scores_from

    found = _candidates.best(t.shape, probe.scores.shape[0], scorer, t, probe.scores)
    scores = lax.bitcast_convert_type(found.scores, jnp.float32)
    rows, cols = jnp.divmod(found.places, outputs)
    places = rows.astype(jnp.float32), cols.astype(jnp.float32)
    return Probe(stored, scores, *places, checksum(rows, cols))
