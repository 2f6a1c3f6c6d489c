"""Where arrays live: one rule for parameters, masks and optimizer state, one for batches.

A mesh has two axes. Along `params` every array of the state is cut into parts, as in FSDP;
along `data` it is repeated. A batch is spread over all devices. One device is a mesh of 1 x 1.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from rigl_optax.training import config as config_lib
from rigl_optax.training import hosts
from rigl_optax.training.config import Config

PyTree = Any
Host = dict[str, np.ndarray]

DATA, PARAMS = "data", "params"
AXIS_TYPES = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}


class Placement(NamedTuple):
    """Where the arrays of a run live.

    Attributes:
      mesh: Two axes, `data` and `params`, auto or explicit.
    """

    mesh: Mesh

    def of(self, tree: PyTree) -> PyTree:
        """Returns the sharding of each leaf, from its shape alone.

        A weight, its mask and its momentum have one shape, and so are cut alike.
        """
        ways = self.mesh.shape[PARAMS]
        return jax.tree.map(lambda x: NamedSharding(self.mesh, partition(x.shape, ways)), tree)

    def gather(self, tree: PyTree) -> PyTree:
        """Returns the same values, whole on every device; in a compiled function.

        Gradients come back in parts: the transpose of gathering is to scatter the sum. XLA gathers
        each weight where it is used and drops it afterwards.
        """
        whole = NamedSharding(self.mesh, PartitionSpec())
        is_explicit = AxisType.Explicit in self.mesh.axis_types
        place = jax.sharding.reshard if is_explicit else jax.lax.with_sharding_constraint
        return jax.tree.map(lambda x: place(x, whole), tree)

    def abstract(self, initial: Callable[[], PyTree]) -> PyTree:
        """Returns shapes, types and shardings of what `initial` would make; computes nothing."""
        found = jax.eval_shape(initial)
        return jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            found,
            self.of(found),
        )

    def maker(self, initial: Callable[..., PyTree], *given: PyTree) -> Callable[[], PyTree]:
        """Returns a function that makes what `initial` makes, in parts: nothing is ever whole.

        It compiles once, however often it is called.

        Args:
          initial: Makes a tree of arrays from what is given.
          *given: Trees of NumPy arrays, the same on all processes.
        """
        # Under explicit axes what an initializer draws would be typed as repeated, and whole.
        # The parts are the same; handing them over to the other mesh copies nothing.
        types = (AxisType.Auto,) * 2
        auto = Placement(Mesh(self.mesh.devices, self.mesh.axis_names, axis_types=types))
        compiled = jax.jit(initial, out_shardings=auto.of(jax.eval_shape(initial, *given)))

        def make() -> PyTree:
            made = compiled(*given)
            return made if auto == self else jax.device_put(made, self.of(made))

        return make

    @property
    def batch(self) -> NamedSharding:
        """The leading axis over all devices."""
        return NamedSharding(self.mesh, PartitionSpec((DATA, PARAMS)))

    def rows(self, batch_size: int) -> np.ndarray:
        """Returns which examples of a batch are on this host's devices: int64, ascending.

        Raises:
          ValueError: If the devices cannot have equal parts.
        """
        if batch_size % self.mesh.size:
            data, params = self.mesh.devices.shape
            raise ValueError(
                f"batch_size={batch_size}: must be a multiple of {self.mesh.size}, the devices of "
                f"the mesh ({data} for data x {params} for params)"
            )
        parts = self.batch.addressable_devices_indices_map((batch_size,)).values()
        every = np.arange(batch_size)
        return np.unique(np.concatenate([every[part] for part in parts if part is not None]))

    def padded(self, batch_size: int) -> int:
        """Returns the next multiple of the number of devices."""
        return -(-batch_size // self.mesh.size) * self.mesh.size

    def put(self, batch: Host) -> PyTree:
        """Makes the global batch; each host hands in its part, the examples in `rows`."""
        if self.mesh.size == 1 and self.mesh.devices.flat[0].platform == "cpu":
            return batch  # a compiled function takes it as it is, in a third of the time
        if self.mesh.size == 1:
            return jax.device_put(batch, self.mesh.devices.flat[0])
        return {
            name: jax.make_array_from_process_local_data(self.batch, part)
            for name, part in batch.items()
        }

    def compile(self, function: Callable[..., PyTree], **options: Any) -> Callable[..., PyTree]:
        """Compiles as `jax.jit` does, but on several CPU devices calls run one after the other.

        CPU devices share the threads of one client. Queued calls would take the threads that the
        collectives of the first call wait for: a deadlock.
        """
        compiled = jax.jit(function, **options)
        if len(self.mesh.local_devices) == 1 or self.mesh.devices.flat[0].platform != "cpu":
            return compiled

        @functools.wraps(compiled)
        def in_turn(*args: Any) -> PyTree:
            return jax.block_until_ready(compiled(*args))

        return in_turn


def partition(shape: tuple[int, ...], ways: int) -> PartitionSpec:
    """Cuts the largest axis that `ways` divides, the first of equals; if there is none, no axis.

    Examples:
      >>> [tuple(partition(shape, 4)) for shape in [(64, 300), (3, 3, 64, 64), (10,)]]
      [(None, 'params'), (None, None, 'params', None), ()]
    """
    divisible = [size if size and size % ways == 0 else 0 for size in shape]
    if ways == 1 or not any(divisible):
        return PartitionSpec()
    axis = divisible.index(max(divisible))
    return PartitionSpec(*(PARAMS if i == axis else None for i in range(len(shape))))


def placement(config: Config) -> Placement:
    """Makes the mesh that the config asks for, on the devices there are.

    Raises:
      ValueError: If there are not enough devices, or, with several processes, some of them
        would be left out.
    """
    hosts.check_devices()
    devices = jax.devices()
    params = config.mesh.params
    data = config.mesh.data or -(-len(devices) // params)
    used = data * params
    if used > len(devices) or (used < len(devices) and jax.process_count() > 1):
        raise ValueError(
            f"config.mesh.data={config.mesh.data}, config.mesh.params={params}: {data} x {params} "
            f"devices, but there are {len(devices)} on {jax.process_count()} process(es); "
            "mesh.params must divide them, and mesh.data=0 stands for the quotient"
        )
    return Placement(
        jax.make_mesh(
            (data, params),
            (DATA, PARAMS),
            axis_types=(AXIS_TYPES[config.mesh.axes],) * 2,
            devices=devices[:used],
        )
    )


def fitting(config: Config) -> Config:
    """Returns the config, on one device if its mesh does not fit the devices that are here."""
    try:
        placement(config)
    except ValueError:
        return config_lib.changed(config, {"mesh.data": 1, "mesh.params": 1})
    return config
