"""Networks to train sparse, as Flax NNX modules; needs the `train` extra."""
