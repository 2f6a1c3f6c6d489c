"""GPT of the size of GPT-2's smallest, 124 million weights, on nanoGPT's token files.

    rigl-optax train text_gpt_124m \
        --config.data.dir=/data/openwebtext --workdir=runs/gpt_124m

`data.dir` holds `train.bin` and `val.bin`, as nanoGPT's prepare.py writes them. Any folder of text,
read as bytes: --config.data.name=text --config.model.vocabulary=256. With --config.model.scan=True
the 12 blocks are one loop over stacked parameters: the program is that of one block. Widths, rates
and batches of 0.5 million tokens are those of nanoGPT's recipe for GPT-2. Not run: no accelerator
was there.
"""

from ml_collections import config_dict


def get_config() -> config_dict.ConfigDict:
    """Returns the keys that differ from the defaults in `rigl_optax.training.config`."""
    return config_dict.ConfigDict(
        {
            "steps": 600_000,
            "batch_size": 480,
            "data": {"name": "tokens", "sequence_length": 1_024},
            "model": {
                "name": "gpt",
                "dtype": "bfloat16",
                "vocabulary": 50_304,
                "embedding": 768,
                "depth": 12,
                "heads": 12,
                "positions": "learned",
                "tied": True,
            },
            "method": {"name": "rigl", "sparsity": 0.9},
            "optimizer": {
                "name": "adamw_by_age",
                "learning_rate": 6e-4,
                "warmup": 2_000 / 600_000,
                "b2": 0.95,
                "weight_decay": 0.1,
                "gradient_clip": 1.0,
            },
            "eval": {"every": 5_000, "batch_size": 480},
            "checkpoint": {"every": 5_000},
        }
    )
