"""WRN-10-1 on Fashion-MNIST resized to 32x32: 1,650 steps of 100 images (3 epochs).

    rigl-optax train fashion_mnist_wrn --workdir=runs/fashion-mnist-wrn
    make compare-vision

The second runs dense, static and RigL at 90 and 95 % with 3 seeds: 15 runs of about 150 s on 2
idle cores. Expected: the table in docs/vision.md, measured here.
The network is the paper's for CIFAR-10 with less depth and width (77,562 parameters); a cosine
replaces steps of the rate, without dropout or augmentation. There are 13 rewirings (paper: 750).
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    keys = ConfigDict({"steps": 1_650, "batch_size": 100})
    keys.data = {"name": "fashion_mnist", "image_size": 32}
    keys.model = {"name": "wide_resnet", "depth": 10, "k": 1}
    keys.method = {"name": "rigl", "sparsity": 0.95}
    keys.optimizer = {"learning_rate": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4}
    keys.update({"log": {"every": 50}, "eval": {"every": 275}, "checkpoint": {"every": 550}})
    return keys
