"""WRN-22-2 on CIFAR-10: 97,656 steps of 128 images (250 epochs), RigL at 90 %, ERK.

On one host (for a pod or SLURM see docs/scale.md); `data.dir` holds TFDS's `cifar10`:

    rigl-optax train cifar10_wrn22_2 --config.data.dir=/data/tfds --workdir=runs/wrn22_2

Variants, each by a flag:

    --config.method.name=static     or dense, snip, small_dense, set, snfs, gmp, ...
    --config.method.sparsity=.95    the paper has .5 .8 .9 .95
    --config.method.distribution.name=uniform
    --config.steps=195_312          2 times as long; see "Recipes" in docs/vision.md
    --config.model.width=2          big-sparse
    --config.method.name=gmp --config.method.every=1_000  pruning from step 20,000 to 75,000

Expected (by the paper's first author, ERK): test accuracy in percent, dense 94.1. FLOPs are those
of inference against dense, 316e6, by our counting:

                  50 %     80 %     90 %     95 %
    static        94.1     92.9     91.5     89.0
    pruning       94.0     93.6     93.3     92.3
    RigL          94.2     93.6     92.9     91.8
    RigL 2x       94.2     93.8     93.3     92.4
    FLOPs         .729x    .354x    .175x    .090x   (uniform .502x .203x .104x .054x)

Not run here on CIFAR-10; configs/fashion_mnist_wrn.py runs a narrower network. The dropout of 0.3
in each block is the reference code's, and not in the paper (--config.model.dropout=0: none). That
code's flag for the distribution defaults to uniform, but the paper's runs are ERK.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    steps = 97_656  # schedules are fractions of the run, so they scale with `--config.steps`
    keys = ConfigDict({"steps": steps, "batch_size": 128})
    keys.data = {"name": "cifar10", "image_size": 32, "augment": "pad_crop"}
    keys.model = {"name": "wide_resnet", "depth": 22, "k": 2, "dropout": 0.3}
    keys.method = {"name": "rigl", "sparsity": 0.9}
    keys.method.update({"until": 75_000 / steps, "prune_from": 20_000 / steps})
    keys.optimizer = {"learning_rate": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4}
    keys.optimizer.update({"schedule": "step", "decay_factor": 0.2})
    keys.optimizer.decay_at = (30_000 / steps, 60_000 / steps, 90_000 / steps)
    keys.update({"eval": {"every": 3_900, "batch_size": 1_000}, "checkpoint": {"every": 3_900}})
    return keys
