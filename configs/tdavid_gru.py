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
    """The recipe; `rigl_optax.training.config.Config` says what each key means."""
    return config_dict.ConfigDict(
        {
            "dataset": "tdavid",
            "data_dir": "",
            "validation_fraction": 0.0,
            "image_size": 0,
            "augment": "none",
            "loader_threads": 1,
            "model": "gru",
            "hidden": (256,),
            "width": 1.0,
            "dense_layers": "default",
            "compute_dtype": "float32",
            "model_options": "",
            "sequence_length": 128,
            "method": "rigl",
            "sparsity": 0.75,
            "distribution": "uniform",
            "method_options": "",
            "ticket": "",
            "structure": "",
            "condensed": False,
            "rewire_every": 50,
            "rewire_until": 0.75,
            "drop_fraction": 0.3,
            "prune_from": 0.2,
            "steps": 1_000,
            "batch_size": 32,
            "optimizer": "adam",
            "learning_rate": 8e-3,
            "schedule": "cosine",
            "warmup": 0.0,
            "decay_at": (),
            "decay_factor": 1.0,
            "momentum": 0.9,
            "gradient_clip": 10.0,
            "weight_decay": 0.0,
            "weight_decay_on": "kernels",
            "label_smoothing": 0.0,
            "seed": 0,
            "log_every": 100,
            "eval_every": 250,
            "eval_batch_size": 256,
            "checkpoint_every": 250,
            "keep_checkpoints": 2,
            "mesh_data": 0,
            "mesh_params": 1,
            "mesh_axes": "auto",
            "compare_at_rewirings": False,
            "on_nonfinite": "stop",
            "max_rollbacks": 10,
            "max_bad_records": 0,
        }
    )
