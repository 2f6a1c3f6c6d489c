"""Training from a config: state, step, loop, checkpoints, metrics. Needs the `train` extra."""
