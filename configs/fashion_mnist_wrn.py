"""WRN-10-1 on Fashion-MNIST resized to 32x32: 1,650 steps of 100 images (3 epochs).

    python scripts/train.py --config=configs/fashion_mnist_wrn.py --workdir=runs/fashion-mnist-wrn
    make compare-vision

The second puts dense, static and RigL side by side at 90 and 95 % with 3 seeds each
([docs/vision.md](../docs/vision.md)): 15 runs of about two and a half minutes on 2 quiet cores. It
is the CIFAR-10 network of the paper with less depth and width, 77,562 parameters, and its recipe in
short: a cosine instead of steps of the rate, no dropout, no augmentation. Rewirings come every 100
steps as in the paper, so there are 13 of them, where the paper's run has 750.
"""

from ml_collections import config_dict


def get_config() -> config_dict.ConfigDict:
    """The recipe; `rigl_optax.training.config.Config` says what each key means."""
    return config_dict.ConfigDict(
        {
            "dataset": "fashion_mnist",
            "data_dir": "",
            "validation_fraction": 0.0,
            "image_size": 32,
            "augment": "none",
            "loader_threads": 1,
            "model": "wide_resnet",
            "hidden": (),
            "width": 1.0,
            "dense_layers": "default",
            "compute_dtype": "float32",
            "model_options": "depth=10,k=1",
            "sequence_length": 0,
            "method": "rigl",
            "sparsity": 0.95,
            "distribution": "erk",
            "method_options": "",
            "ticket": "",
            "structure": "",
            "condensed": False,
            "rewire_every": 100,
            "rewire_until": 0.75,
            "drop_fraction": 0.3,
            "prune_from": 0.2,
            "steps": 1_650,
            "batch_size": 100,
            "optimizer": "sgd",
            "learning_rate": 0.1,
            "schedule": "cosine",
            "warmup": 0.0,
            "decay_at": (),
            "decay_factor": 1.0,
            "momentum": 0.9,
            "gradient_clip": 0.0,
            "weight_decay": 5e-4,
            "weight_decay_on": "kernels",
            "label_smoothing": 0.0,
            "seed": 0,
            "log_every": 50,
            "eval_every": 275,
            "eval_batch_size": 500,
            "checkpoint_every": 550,
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
