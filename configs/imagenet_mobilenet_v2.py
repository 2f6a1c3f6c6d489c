"""MobileNet-v2 on ImageNet-2012: 160,000 steps of 4,096 images (5 x 102 epochs), RigL at 75 %, ERK.

    rigl-optax train imagenet_mobilenet_v2 --config.data.dir=/data/tfds --workdir=runs/mobilenet_v2

Variants, and where the paper and its code disagree: as in configs/imagenet_mobilenet_v1.py.
Expected: the paper has a plot only. Inference FLOPs against dense, 608e6, by our counting:

               75 %     85 %     90 %     95 %
    ERK        .684x    .566x    .462x    .301x
    uniform    .336x    .248x    .203x    .159x

Not run here on ImageNet; the same program ran on small images (docs/vision.md).
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    epoch = 1_281_167 / (4_096 * 32_000)  # one epoch as a fraction of the 1x run
    keys = ConfigDict({"steps": 160_000, "batch_size": 4_096, "model": {"name": "mobilenet_v2"}})
    keys.data = {"name": "imagenet2012", "image_size": 224, "threads": 16}
    keys.data.augment = "resized_crop"
    keys.method = {"name": "rigl", "sparsity": 0.75, "until": 25 / 32, "prune_from": 10 / 32}
    keys.optimizer = {"learning_rate": 1.6, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-4}
    keys.optimizer.update({"schedule": "step", "warmup": 5 * epoch, "decay_factor": 0.1})
    keys.optimizer.decay_at = (30 * epoch, 70 * epoch, 90 * epoch)
    keys.optimizer.weight_decay_on = "kernels_but_depthwise"
    keys.update({"loss": {"label_smoothing": 0.1}, "eval": {"every": 5_000, "batch_size": 1_000}})
    keys.checkpoint = {"every": 5_000}
    return keys
