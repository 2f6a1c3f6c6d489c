"""LeNet-300-100 on scikit-learn's digits: 1,000 training images of 8x8 pixels, 2,000 steps.

    rigl-optax train digits_lenet --workdir=runs/digits
    rigl-optax compare digits_lenet --workdir=runs/digits-comparison

The second takes about 3 minutes on 2 CPU cores. Expected (measured here), 95 % sparse (2,921 of
50,610 weights with biases), test accuracy in percent, mean and standard deviation of seeds 0 to 4:

    dense   97.40 +- 0.37
    static  94.72 +- 0.72
    SET     95.20 +- 0.58   minus static, paired: +0.48 +- 0.84, better in 3 of 5
    RigL    96.20 +- 0.51   minus static, paired: +1.48 +- 0.92, better in 5 of 5

The test split has 500 images, so one image is 0.2 points. Learning rate and rewiring interval were
chosen on the validation split with other seeds; at a rate of 0.2 one RigL run of five diverged.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    keys = ConfigDict({"steps": 2_000, "batch_size": 100, "data": {"name": "digits"}})
    keys.model = {"name": "lenet", "hidden": (300, 100)}
    keys.method = {"name": "rigl", "sparsity": 0.95, "every": 50}
    keys.optimizer = {"learning_rate": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-4}
    keys.update({"log": {"every": 50}, "eval": {"every": 100}, "checkpoint": {"every": 500}})
    return keys
