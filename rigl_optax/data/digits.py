"""Scikit-learn's digits: 1,797 real handwritten 8x8 images, bundled in its wheel.

The default dataset: it needs no download. The images are the test part of UCI's
"Optical Recognition of Handwritten Digits", with pixel values 0 to 16.
"""

import functools
import gzip
import importlib.metadata

import numpy as np

from rigl_optax.data import batches

TEST, VALIDATION = 500, 297  # leaves 1,000 for training
SPLIT_SEED = 0


def load(data_dir: str = "", max_bad_records: int = 0) -> batches.Dataset:
    """Loads the digits, split 1,000 / 297 / 500 into train, validation and test.

    The split never changes: it is drawn from the fixed `SPLIT_SEED`, stratified by class.

    Args:
      data_dir: Must be empty; the data come with scikit-learn.
      max_bad_records: Ignored: the data are one file, read whole.

    Returns:
      Images uint8 (examples, 8, 8) with values 0 to 16, labels int32 (examples,).

    Raises:
      ValueError: If `data_dir` is not empty.

    Examples:
      >>> data = load()
      >>> data.train.images.shape, data.validation.images.shape, data.test.images.shape
      ((1000, 8, 8), (297, 8, 8), (500, 8, 8))
    """
    del max_bad_records
    if data_dir:
        raise ValueError(
            f"config.data.dir={data_dir!r}: digits come with scikit-learn; leave it empty"
        )
    images, labels = _read()
    order = _stratified_order(labels)
    test, validation, train = np.split(order, [TEST, TEST + VALIDATION])
    return batches.Dataset(
        train=batches.Split(images[train], labels[train]),
        validation=batches.Split(images[validation], labels[validation]),
        test=batches.Split(images[test], labels[test]),
        classes=10,
        maximum=16.0,
    )


@functools.cache
def _read() -> tuple[np.ndarray, np.ndarray]:
    """Reads images and labels; once, for comparisons train many runs in one process."""
    # The file, without scikit-learn: to import it takes a second, a fifth of what a small run
    # takes to start.
    wheel = importlib.metadata.distribution("scikit-learn")
    with gzip.open(str(wheel.locate_file("sklearn/datasets/data/digits.csv.gz")), "rt") as file:
        table = np.loadtxt(file, delimiter=",", dtype=np.int32)
    return table[:, :-1].reshape(-1, 8, 8).astype(np.uint8), table[:, -1].copy()


def _stratified_order(labels: np.ndarray) -> np.ndarray:
    """Draws an order of which any stretch holds the classes in proportion.

    Example `i` of the `n` in a class is put at position `(i + u) / n`, with one uniform `u` for
    the class, so any cut of the order is stratified to within one or two examples of a class.
    """
    generator = np.random.Generator(np.random.Philox(key=SPLIT_SEED))
    place = np.empty(len(labels))
    for label in np.unique(labels):
        members = generator.permutation(np.flatnonzero(labels == label))
        place[members] = (np.arange(len(members)) + generator.random()) / len(members)
    return np.argsort(place, kind="stable")
