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
    """Returns the keys that differ from the defaults in `rigl_optax.training.config`."""
    return config_dict.ConfigDict(
        {
            "steps": 1_650,
            "batch_size": 100,
            "data": {"name": "fashion_mnist", "image_size": 32},
            "model": {"name": "wide_resnet", "depth": 10, "k": 1},
            "method": {"name": "rigl", "sparsity": 0.95},
            "optimizer": {
                "name": "sgd",
                "nesterov": True,
                "momentum": 0.9,
                "learning_rate": 0.1,
                "weight_decay": 5e-4,
            },
            "log": {"every": 50},
            "eval": {"every": 275},
            "checkpoint": {"every": 550},
        }
    )
