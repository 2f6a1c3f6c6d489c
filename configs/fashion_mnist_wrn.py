"""WRN-10-1 on Fashion-MNIST resized to 32x32: 1,650 steps of 100 images (3 epochs).

    rigl-optax train fashion_mnist_wrn --workdir=runs/fashion-mnist-wrn
    make compare-vision

The second compares dense, static and RigL at 90 and 95 % with 3 seeds each: 15 runs of about two
and a half minutes on 2 idle cores. Expected: the table in docs/vision.md, measured here.

The network is the paper's for CIFAR-10 with less depth and width (77,562 parameters); a cosine
replaces steps of the rate, without dropout or augmentation. There are 13 rewirings (paper: 750).
"""

from ml_collections import config_dict


def get_config() -> config_dict.ConfigDict:
    """Returns the keys that differ from the defaults in `rigl_optax.training.config`."""
    keys = {
        "steps": 1_650,
        "batch_size": 100,
        "data": {"name": "fashion_mnist", "image_size": 32},
        "model": {"name": "wide_resnet", "depth": 10, "k": 1},
        "method": {"name": "rigl", "sparsity": 0.95},
        "optimizer": {
            "momentum": 0.9,
            "nesterov": True,
            "learning_rate": 0.1,
            "weight_decay": 5e-4,
        },
        "log": {"every": 50},
        "eval": {"every": 275},
        "checkpoint": {"every": 550},
    }
    return config_dict.ConfigDict(keys)
