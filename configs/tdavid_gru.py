"""GRU on the bytes of the Treasury of David, 11.8 MB of Victorian prose: minutes on 2 cores.

    python scripts/train.py --config=configs/tdavid_gru.py --workdir=runs/tdavid_gru
    python scripts/sample.py --workdir=runs/tdavid_gru --prompt="The Lord"

Needs the files of Debian's package `sword-comm-tdavid`. Against the paper's recipe on WikiText-103:
a state of 256, sequences of 128, 1,000 steps at a learning rate of 8e-3 with a cosine to 0, no L2,
rewirings of 30 % every 50 steps until three quarters of the run. `make compare-text` puts methods
side by side ([docs/text.md](../docs/text.md)).

Chosen on validation after 450 steps with seed 100, in bits per byte: the rate, 4e-3 or 8e-3, dense
2.191 or 2.086, static at 90 % 3.156 or 2.666; RigL at 90 % with 10 or 30 % every 50 steps, 2.665 or
2.632.
"""

from ml_collections import config_dict


def get_config() -> config_dict.ConfigDict:
    """Returns the keys that differ from the defaults in `rigl_optax.training.config`."""
    return config_dict.ConfigDict(
        {
            "steps": 1_000,
            "batch_size": 32,
            "data": {"name": "tdavid", "sequence_length": 128},
            "model": {"name": "gru", "hidden": (256,)},
            "method": {
                "name": "rigl",
                "sparsity": 0.75,
                "distribution": {"name": "uniform"},
                "every": 50,
            },
            "optimizer": {"name": "adam", "learning_rate": 8e-3, "gradient_clip": 10.0},
            "eval": {"every": 250, "batch_size": 256},
            "checkpoint": {"every": 250},
        }
    )
