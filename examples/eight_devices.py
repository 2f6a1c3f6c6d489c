"""Eight devices: batches are split over them, and so is the largest kernel.

    XLA_FLAGS=--xla_force_host_platform_device_count=8 python examples/eight_devices.py

The flag makes eight fake devices of a CPU. On real ones leave it out.
"""

import jax
import numpy as np
import optax
import plain_jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from sklearn.datasets import load_digits

import rigl_optax


def train(devices: list, steps: int) -> tuple[dict, dict]:
    """Trains on some devices; returns parameters and masks."""
    images, labels = load_digits(return_X_y=True)
    images, labels = np.asarray(images / 16, np.float32), np.asarray(labels)
    mesh = Mesh(np.array(devices), ("data",))
    rows_split = NamedSharding(mesh, PartitionSpec("data"))
    everywhere = NamedSharding(mesh, PartitionSpec())
    columns_split = NamedSharding(mesh, PartitionSpec(None, "data"))

    params = plain_jax.init(jax.random.key(0), (64, 304, 104, 10))
    params = jax.device_put(params, everywhere)
    params["layer0"]["kernel"] = jax.device_put(params["layer0"]["kernel"], columns_split)

    tx = rigl_optax.rigl(optax.adamw(3e-3), sparsity=0.95, end=3 * steps // 4, every=10)
    opt_state = tx.init(params)  # masks and moments are placed like their weights

    @jax.jit
    def step(params, opt_state, x, y):
        grads = jax.grad(plain_jax.loss)(params, x, y)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    rng = np.random.default_rng(0)
    for _ in range(steps):
        rows = rng.integers(0, 1_300, 96)
        batch = jax.device_put((images[rows], labels[rows]), rows_split)
        params, opt_state = step(params, opt_state, *batch)
    rigl_optax.check(params, opt_state)
    print(f"{len(devices)} devices: masks lie as {opt_state.masks['layer0']['kernel'].sharding}")
    return params, rigl_optax.get_masks(opt_state)


def main(steps: int = 100) -> float:
    """Trains on all devices and on one; returns the least fraction of a mask that agrees."""
    _, masks = train(jax.devices(), steps)
    _, alone = train(jax.devices()[:1], steps)
    pairs = zip(jax.tree.leaves(masks), jax.tree.leaves(alone), strict=True)
    same = min(float((np.asarray(a) == np.asarray(b)).mean()) for a, b in pairs)
    print(f"{100 * same:.1f} % of each mask, or more, is as on one device")
    return same


if __name__ == "__main__":
    main()
