"""LeNet-300-100 on Fashion-MNIST: 55,000 training images of 28x28 pixels, 4,400 steps (8 epochs).

    rigl-optax train fashion_mnist_lenet --workdir=runs/fashion-mnist
    rigl-optax compare fashion_mnist_lenet --sparsities=.95,.98 --workdir=runs/fashion-comparison

The second takes about 10 minutes on 2 CPU cores. Expected (measured here) test accuracy in percent,
mean and standard deviation of seeds 0 to 4, and the paired difference to static:

    dense           88.84 +- 0.09
    95 %   static   87.02 +- 0.20
           SET      87.39 +- 0.06   +0.37 +- 0.26, better in 5 of 5
           RigL     86.79 +- 0.18   -0.23 +- 0.23, better in 1 of 5
    98 %   static   84.76 +- 0.17
           SET      85.85 +- 0.23   +1.09 +- 0.28, better in 5 of 5
           RigL     85.32 +- 0.22   +0.56 +- 0.36, better in 5 of 5

Of the rates 0.05, 0.1 and 0.2, 0.1 is best for the three methods together (validation, 98 %, other
seeds). Static and SET do better at 0.2, where RigL diverges unless its drop fraction is 0.1.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    keys = ConfigDict({"steps": 4_400, "batch_size": 100, "data": {"name": "fashion_mnist"}})
    keys.model = {"name": "lenet", "hidden": (300, 100)}
    keys.method = {"name": "rigl", "sparsity": 0.95}
    keys.optimizer = {"learning_rate": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-4}
    keys.update({"eval": {"every": 275, "batch_size": 1_000}, "checkpoint": {"every": 1_100}})
    return keys
