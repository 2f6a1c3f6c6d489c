"""Datasets, one module each; a batch is a function of (seed, step). Needs the `train` extra."""
