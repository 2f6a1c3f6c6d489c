"""ViT-S/16 on ImageNet-2012: 90 epochs of 1,024 images in 196 patches, RigL at 90 %, ERK.

On one host, whose accelerators share the batch; on a pod or under SLURM see docs/scale.md:

    rigl-optax train imagenet_vit_s16 \
        --config.data.dir=/data/tensorflow_datasets --workdir=runs/vit_s16

Rate, decay, warm-up and the mean of all patches in place of a class token are those of Beyer et
al., "Better plain ViT baselines for ImageNet-1k" (2022), which reaches 76.5 % dense in 90 epochs
with RandAugment and MixUp; those two are not here. Not run: there is no ImageNet where this was
written.
"""

from ml_collections import config_dict

STEPS = 112_590


def get_config() -> config_dict.ConfigDict:
    """Returns the keys that differ from the defaults in `rigl_optax.training.config`."""
    return config_dict.ConfigDict(
        {
            "steps": STEPS,
            "batch_size": 1_024,
            "data": {
                "name": "imagenet2012",
                "image_size": 224,
                "augment": "resized_crop",
                "threads": 16,
            },
            "model": {"name": "vit", "dtype": "bfloat16", "pooled": True},
            "method": {"name": "rigl", "sparsity": 0.9},
            "optimizer": {
                "name": "adamw_by_age",
                "learning_rate": 1e-3,
                "warmup": 10_000 / STEPS,
                "weight_decay": 0.1,
                "gradient_clip": 1.0,
            },
            "eval": {"every": 5_000, "batch_size": 1_000},
            "checkpoint": {"every": 5_000},
        }
    )
