"""ViT on Fashion-MNIST: 28x28 images in 49 patches of 4x4, 4 blocks of width 128.

    rigl-optax train fashion_mnist_vit --workdir=runs/fashion_mnist_vit

Patch embedding, positions, class token, head and norms are dense. Only run for some steps yet.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    keys = ConfigDict({"steps": 4_400, "batch_size": 100, "data": {"name": "fashion_mnist"}})
    keys.model = {"name": "vit", "patch": 4, "embedding": 128, "depth": 4, "heads": 4}
    keys.method = {"name": "rigl", "sparsity": 0.9}
    keys.optimizer = {"name": "adamw_by_age", "learning_rate": 2e-3, "warmup": 0.05}
    keys.optimizer.update({"weight_decay": 0.05, "gradient_clip": 1.0})
    keys.update({"eval": {"every": 550, "batch_size": 1_000}, "checkpoint": {"every": 1_100}})
    return keys
