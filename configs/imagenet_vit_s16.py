"""ViT-S/16 on ImageNet-2012: 90 epochs of 1,024 images in 196 patches, RigL at 90 %, ERK.

    rigl-optax train imagenet_vit_s16 --config.data.dir=/data/tfds --workdir=runs/vit_s16

Rate, decay, warm-up and the mean of all patches in place of a class token are those of Beyer et
al., "Better plain ViT baselines for ImageNet-1k" (2022), which reaches 76.5 % dense in 90 epochs
with RandAugment and MixUp; those two are not here. Not run here: there was no ImageNet.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    keys = ConfigDict({"steps": 112_590, "batch_size": 1_024})
    keys.data = {"name": "imagenet2012", "image_size": 224, "threads": 16}
    keys.data.augment = "resized_crop"
    keys.model = {"name": "vit", "dtype": "bfloat16", "pooled": True}
    keys.method = {"name": "rigl", "sparsity": 0.9}
    keys.optimizer = {"name": "adamw_by_age", "learning_rate": 1e-3, "warmup": 10_000 / 112_590}
    keys.optimizer.update({"weight_decay": 0.1, "gradient_clip": 1.0})
    keys.update({"eval": {"every": 5_000, "batch_size": 1_000}, "checkpoint": {"every": 5_000}})
    return keys
