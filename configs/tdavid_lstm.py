"""LSTM on the bytes of the Treasury of David, 11.8 MB of Victorian prose: minutes on 2 cores.

    python scripts/train.py --config=configs/tdavid_lstm.py --workdir=runs/tdavid_lstm
    python scripts/sample.py --workdir=runs/tdavid_lstm --prompt="The Lord"

Needs the files of Debian's package `sword-comm-tdavid`. Sizes, rate and rewirings are those that
were chosen for the GRU (`configs/tdavid_gru.py`), not again for the LSTM.
"""

from ml_collections import config_dict


def get_config() -> config_dict.ConfigDict:
    """Returns the keys that differ from the defaults in `rigl_optax.training.config`."""
    return config_dict.ConfigDict(
        {
            "steps": 1_000,
            "batch_size": 32,
            "data": {"name": "tdavid", "sequence_length": 128},
            "model": {"name": "lstm", "hidden": (256,)},
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
