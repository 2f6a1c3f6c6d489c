"""GPT of the size of GPT-2's smallest, 124 million weights, on nanoGPT's token files.

    rigl-optax train text_gpt_124m --config.data.dir=/data/openwebtext --workdir=runs/gpt_124m

`data.dir` holds `train.bin` and `val.bin`, as nanoGPT's prepare.py writes them. Any folder of text,
read as bytes: --config.data.name=text --config.model.vocabulary=256. With --config.model.scan=True
the 12 blocks are one loop over stacked parameters: the program is that of one block. Widths, rates
and batches of 0.5 million tokens are those of nanoGPT's recipe for GPT-2. Not run here.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    keys = ConfigDict({"steps": 600_000, "batch_size": 480})
    keys.data = {"name": "tokens", "sequence_length": 1_024}
    keys.model = {"name": "gpt", "dtype": "bfloat16", "vocabulary": 50_304, "embedding": 768}
    keys.model.update({"depth": 12, "heads": 12, "positions": "learned", "tied": True})
    keys.method = {"name": "rigl", "sparsity": 0.9}
    keys.optimizer = {"name": "adamw_by_age", "learning_rate": 6e-4, "warmup": 2_000 / 600_000}
    keys.optimizer.update({"b2": 0.95, "weight_decay": 0.1, "gradient_clip": 1.0})
    keys.update({"eval": {"every": 5_000, "batch_size": 480}, "checkpoint": {"every": 5_000}})
    return keys
