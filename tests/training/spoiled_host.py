"""One process of a run on two, in which something goes wrong on the second; used by test_hosts.

python spoiled_host.py flip|raise COORDINATOR PROCESS WORKDIR
"""

import pathlib
import sys

import jax
import numpy as np

from rigl_optax.training import config as config_lib
from rigl_optax.training import hosts, loop, step
from tests.training.conftest import SMALL

AT = 25  # of 60 steps: after the checkpoint at 20
PATH = ("layers", 1, "kernel")
CONFIG = config_lib.changed(
    SMALL,
    {"mesh.data": 2, "batch_size": 48, "method.every": 7, "faults.compare_at_rewirings": True},
)


def with_one_bit_flipped(state: loop.State) -> loop.State:
    """The state, with one entry of this process's copy of one mask flipped."""
    masks = state.opt_state.masks
    leaf = masks["layers"][1]["kernel"]
    (shard,) = leaf.addressable_shards
    flipped = np.array(shard.data)
    flipped[3, 2] ^= True
    masks["layers"][1]["kernel"] = jax.make_array_from_single_device_arrays(
        leaf.shape, leaf.sharding, [jax.device_put(flipped, shard.device)]
    )
    return state


def main(what: str, coordinator: str, process: int, workdir: str) -> None:
    """Trains; on process 1, update number 25 comes out wrong or fails."""
    hosts.join(coordinator, 2, process)
    make_train_step = step.make_train_step

    def make_spoiled(*args, **keys):
        train_step = make_train_step(*args, **keys)

        def spoiled(state, batch):
            at = int(state.step)
            state = train_step(state, batch)
            if at == AT and process == 1:
                if what == "raise":
                    raise OSError("a disk of process 1 is broken")
                state = with_one_bit_flipped(state)
            return state

        return spoiled

    step.make_train_step = make_spoiled
    with hosts.failing_together():
        loop.train(CONFIG, pathlib.Path(workdir))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4])
