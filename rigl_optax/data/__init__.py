"""Datasets, one module each; a batch is a function of (seed, step). Needs the `train` extra.

`batches` defines what a dataset is and which examples form a batch; `text` does so for bytes.
`digits`, `fashion_mnist` and `cifar10` are read into memory, `imagenet` and `image_folder` stay in
files (`photos`) and are decoded batch by batch.
"""
