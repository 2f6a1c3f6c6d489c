"""WRN-22-2 on CIFAR-10: 97,656 steps of 128 images (250 epochs), RigL at 90 %, ERK.

On one host; on a pod or under SLURM see docs/scale.md. `data.dir` holds TFDS's `cifar10`:

    python scripts/train.py --config=configs/cifar10_wrn22_2.py \
        --config.data.dir=/data/tensorflow_datasets --workdir=runs/wrn22_2

Variants, each by a flag:

    --config.method.name=static     or another method: dense snip small_dense set snfs rigl gmp ...
    --config.method.sparsity=.95    .5 .8 .9 .95 in the paper
    --config.method.distribution.name=uniform
    --config.steps=195_312          2 times as long: drops of the rate, T_end, begin of pruning
                                    are fractions of the run; Delta T and alpha stay
    --config.model.width=2          big-sparse; the method `small_dense` finds its own
    --config.method.name=gmp --config.method.every=1_000  pruning from step 20,000 to 75,000

Expected (paper's first author, ERK): test accuracy in percent, dense 94.1:

                50 %     80 %     90 %     95 %
    static      94.1     92.9     91.5     89.0
    pruning     94.0     93.6     93.3     92.3
    RigL        94.2     93.6     92.9     91.8
    RigL 2x     94.2     93.8     93.3     92.4

Inference FLOPs against dense, 316e6, by our counting: .729 .354 .175 .090 (ERK) and .502 .203 .104
.054 (uniform).

Measured here: nothing on CIFAR-10; a narrower network on Fashion-MNIST is in
configs/fashion_mnist_wrn.py.

The code drops out 0.3 inside each block, which the paper does not mention. The published figures
are from that code, so this does too; without: --config.model.dropout=0. Its flag for the
distribution says uniform unless told otherwise; the paper's runs are ERK.
"""

from ml_collections import config_dict

# Of the run, so that drops of the rate scale with it.
STEPS = 97_656


def get_config() -> config_dict.ConfigDict:
    """Returns the keys that differ from the defaults in `rigl_optax.training.config`."""
    return config_dict.ConfigDict(
        {
            "steps": STEPS,
            "batch_size": 128,
            "data": {"name": "cifar10", "image_size": 32, "augment": "pad_crop"},
            "model": {"name": "wide_resnet", "depth": 22, "k": 2, "dropout": 0.3},
            "method": {
                "name": "rigl",
                "sparsity": 0.9,
                "until": 75_000 / STEPS,
                "prune_from": 20_000 / STEPS,
            },
            "optimizer": {
                "name": "sgd",
                "nesterov": True,
                "momentum": 0.9,
                "learning_rate": 0.1,
                "schedule": "step",
                "decay_at": (30_000 / STEPS, 60_000 / STEPS, 90_000 / STEPS),
                "decay_factor": 0.2,
                "weight_decay": 5e-4,
            },
            "eval": {"every": 3_900, "batch_size": 1_000},
            "checkpoint": {"every": 3_900},
        }
    )
