"""GPT on the bytes of the Treasury of David, 11.8 MB of Victorian prose: minutes on 2 cores.

    rigl-optax train tdavid_gpt --workdir=runs/tdavid_gpt
    rigl-optax sample --workdir=runs/tdavid_gpt --prompt="The Lord"

Needs the files of Debian's package `sword-comm-tdavid`. Pre-norm, rotary positions, 4 blocks of
width 128, 0.8 million weights in the sparse kernels; embedding, head and norms are dense. Five
million bytes of text, half an epoch. `make compare-gpt` puts methods side by side.

    --config.method.name=static         or another method: dense small_dense set gmp granet top_kast
    --config.optimizer.name=adamw       Optax's, without a step count per weight
    --config.optimizer.base_width=0     the same learning rate at all widths and densities: then
                                        2e-3 is best for the dense network, 1e-2 to 2e-2 for 90 %
"""

from ml_collections import config_dict


def get_config() -> config_dict.ConfigDict:
    """Returns the keys that differ from the defaults in `rigl_optax.training.config`."""
    return config_dict.ConfigDict(
        {
            "steps": 2_500,
            "batch_size": 8,
            "data": {"name": "tdavid", "sequence_length": 256},
            "model": {"name": "gpt", "embedding": 128, "depth": 4, "heads": 4},
            "method": {"name": "rigl", "sparsity": 0.9},
            "optimizer": {
                "name": "adamw_by_age",
                "learning_rate": 2e-2,
                "base_width": 16,
                "warmup": 0.05,
                "b2": 0.95,
                "weight_decay": 0.1,
                "gradient_clip": 1.0,
            },
            "eval": {"every": 1_250, "batch_size": 64},
            "checkpoint": {"every": 1_250},
        }
    )
