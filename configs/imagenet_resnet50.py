"""ResNet-50 on ImageNet-2012: 32,000 steps of 4,096 images (102 epochs), RigL at 80 %, ERK.

    rigl-optax train imagenet_resnet50 --config.data.dir=/data/tfds --workdir=runs/resnet50

A folder for each class instead of TFDS: --config.data.name=image_folder. For batches of b images:
--config.batch_size=b, 32,000 * 4,096 / b steps, a learning rate of 1.6 * b / 4,096. Variants:

    --config.method.name=static     or dense, snip, small_dense, set, snfs, gmp, ...
    --config.method.sparsity=.9     the paper has .8 .9 .95 .965 .99
    --config.method.distribution.name=uniform
    --config.steps=160_000          5 times as long; see "Recipes" in docs/vision.md
    --config.loss.label_smoothing=0
    --config.model.dense_layers=stem  with ERK a dense first convolution, as the paper at 99 %
    --config.model.width=2.1        big-sparse
    --config.method.name=gmp --config.method.every=1_000  pruning from step 10,000 to 25,000

Expected (paper): top-1 in percent, training and inference FLOPs against dense, 3.2e18 and 8.2e9:

                    80 %                 90 %                 95 %          96.5 %
    dense           76.8 +- .09
    static          70.6  .23x .23x      65.8  .10x .10x      59.5  .08x    55.4  .07x
    SNIP            72.0  .23x .23x      67.2  .10x .10x      57.8  .08x    52.0  .07x
    small-dense     72.1  .20x .20x      68.9  .12x .12x
    SET             72.9  .23x .23x      69.6  .10x .10x      64.4  .08x    60.8  .07x
    RigL            74.6  .23x .23x      72.0  .10x .10x      67.5  .08x    65.0  .07x
    RigL 5x         76.6  1.14x .23x     75.7  .52x .10x      73.1  .08x    71.1  .07x
    static (ERK)    72.1  .42x .42x      67.7  .24x .24x
    RigL (ERK)      75.1  .42x .42x      73.0  .25x .24x      69.7  .12x    67.2  .11x
    RigL 5x (ERK)   77.1  2.09x .42x     76.4  1.23x .24x     74.5  .12x    72.7  .11x
    SNFS (ERK)      75.2  .61x .42x      72.9  .50x .24x      70.0  .12x    67.1  .11x

99 % (ERK, first convolution dense): 61.9 at 5x, 68.2 at 100x. By the paper's own rule the FLOPs of
uniform at 90 % are .13x and .66x; those in the table ignore that the first convolution is dense.

Not run here on ImageNet; the same program ran on small images (docs/vision.md). Where the paper's
text and the reference code disagree, this follows the text, with one exception:
- The text has 5 epochs of warm-up, the code none: --config.optimizer.warmup=0.
- The text has momentum. The code's is Nesterov's, as here: --config.optimizer.nesterov=False.
- The text has a cosine for the drop fraction, from 0.3; the code's flag defaults to a constant.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    epoch = 1_281_167 / (4_096 * 32_000)  # one epoch as a fraction of the 1x run
    keys = ConfigDict({"steps": 32_000, "batch_size": 4_096, "model": {"name": "resnet50"}})
    keys.data = {"name": "imagenet2012", "image_size": 224, "threads": 16}
    keys.data.augment = "resized_crop"
    keys.method = {"name": "rigl", "sparsity": 0.8, "until": 25 / 32, "prune_from": 10 / 32}
    keys.optimizer = {"learning_rate": 1.6, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-4}
    keys.optimizer.update({"schedule": "step", "warmup": 5 * epoch, "decay_factor": 0.1})
    keys.optimizer.decay_at = (30 * epoch, 70 * epoch, 90 * epoch)
    keys.update({"loss": {"label_smoothing": 0.1}, "eval": {"every": 1_250, "batch_size": 1_000}})
    keys.checkpoint = {"every": 1_250}
    return keys
