"""GPT on the bytes of the Treasury of David, 11.8 MB of Victorian prose: minutes on 2 cores.

    rigl-optax train tdavid_gpt --workdir=runs/tdavid_gpt
    rigl-optax sample --workdir=runs/tdavid_gpt --prompt="The Lord"

Needs the files of Debian's package `sword-comm-tdavid`. Pre-norm, rotary positions, 4 blocks of
width 128, 0.8 million weights in the sparse kernels; embedding, head and norms are dense. Five
million bytes of text, half an epoch. `make compare-gpt` puts methods side by side.

    --config.method.name=static         or another method: dense small_dense set gmp granet top_kast
    --config.optimizer.name=adamw       Optax's, without a step count per weight
    --config.optimizer.base_width=0     one rate for all: 2e-3 is best dense, 1e-2 to 2e-2 at 90 %
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    keys = ConfigDict({"steps": 2_500, "batch_size": 8})
    keys.data = {"name": "tdavid", "sequence_length": 256}
    keys.model = {"name": "gpt", "embedding": 128, "depth": 4, "heads": 4}
    keys.method = {"name": "rigl", "sparsity": 0.9}
    keys.optimizer = {"name": "adamw_by_age", "learning_rate": 2e-2, "base_width": 16, "b2": 0.95}
    keys.optimizer.update({"warmup": 0.05, "weight_decay": 0.1, "gradient_clip": 1.0})
    keys.update({"eval": {"every": 1_250, "batch_size": 64}, "checkpoint": {"every": 1_250}})
    return keys
