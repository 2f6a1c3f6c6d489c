"""MobileNet-v1 on ImageNet-2012: 160,000 steps of 4,096 images (5 x 102 epochs), RigL at 75 %, ERK.

On one host, whose accelerators share the batch (for a pod or SLURM see docs/scale.md):

    rigl-optax train imagenet_mobilenet_v1 \
        --config.data.dir=/data/tensorflow_datasets --workdir=runs/mobilenet_v1

Variants, each by a flag:

    --config.method.name=static     or dense, snip, small_dense, set, snfs, gmp, ...
    --config.method.sparsity=.9     the paper has .75 .85 .9 .95 (of the masked layers; of all
                                    weights these are 74.2, 84.1, 89, 94 %)
    --config.method.distribution.name=uniform
    --config.steps=32_000           once instead of 5 times; see "Recipes" in docs/vision.md
    --config.loss.label_smoothing=0
    --config.model.width=1.98       big-sparse

Expected (paper, all 5 times as long): top-1 in percent, and inference FLOPs against dense, 1.1e9:

                    75 %             90 %
    dense           72.1 +- .17
    small-dense     66.0  .23x       57.7  .09x
    RigL            71.5  .27x       67.0  .12x
    RigL (ERK)      71.9  .52x       68.1  .27x
    big-sparse, width 1.98           76.4  .98x uniform, 77.0  1.91x ERK, at 75 %

With dense depthwise convolutions, as trained, the FLOPs are .29x .15x (uniform), .52x .29x (ERK).
Not run here on ImageNet; the same program ran on small images (docs/vision.md). The paper states
one schedule for all ImageNet networks, used here. The reference code has another for MobileNets,
`--config.optimizer.warmup=0.0782 --config.optimizer.decay_at="(0.391,0.7331,0.9286)"` (epochs 8;
40, 75, 95); which of them gave the published figures is not known. Depthwise convolutions stay
dense, as the text says; the published FLOPs of uniform count them as sparse:
`--config.model.dense_layers=stem`. As in the code, L2 leaves out depthwise kernels; on all kernels:
`--config.optimizer.weight_decay_on=kernels`.
"""

from ml_collections import config_dict


def get_config() -> config_dict.ConfigDict:
    """Returns the keys that differ from the defaults in `rigl_optax.training.config`."""
    epoch = 1_281_167 / (4_096 * 32_000)  # one epoch as a fraction of the 1x run
    sgd = {"momentum": 0.9, "nesterov": True, "learning_rate": 1.6, "weight_decay": 1e-4}
    drops = {"decay_at": (30 * epoch, 70 * epoch, 90 * epoch), "decay_factor": 0.1}
    schedule = {"schedule": "step", "warmup": 5 * epoch, **drops}
    photos = {"name": "imagenet2012", "image_size": 224, "augment": "resized_crop", "threads": 16}
    keys = {
        "steps": 160_000,
        "batch_size": 4_096,
        "data": photos,
        "model": {"name": "mobilenet_v1"},
        "method": {"name": "rigl", "sparsity": 0.75, "until": 25 / 32, "prune_from": 10 / 32},
        "optimizer": {**sgd, **schedule, "weight_decay_on": "kernels_but_depthwise"},
        "loss": {"label_smoothing": 0.1},
        "eval": {"every": 5_000, "batch_size": 1_000},
        "checkpoint": {"every": 5_000},
    }
    return config_dict.ConfigDict(keys)
