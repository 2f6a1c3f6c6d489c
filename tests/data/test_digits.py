import hashlib

import numpy as np
import pytest

from rigl_optax.data import digits


@pytest.fixture(scope="module")
def data():
    return digits.load()


def test_sizes_types_and_range(data):
    assert [s.images.shape for s in data[:3]] == [(1000, 8, 8), (297, 8, 8), (500, 8, 8)]
    assert all(s.images.dtype == np.uint8 and s.labels.dtype == np.int32 for s in data[:3])
    assert max(s.images.max() for s in data[:3]) == data.maximum == 16


def test_splits_are_disjoint_and_complete(data):
    from sklearn import datasets

    theirs = datasets.load_digits()
    images, labels = digits._read()
    np.testing.assert_array_equal(images, theirs.images)
    np.testing.assert_array_equal(labels, theirs.target)
    order = digits._stratified_order(labels)
    assert sorted(order) == list(range(1797))


def test_splits_are_stratified(data):
    whole = np.sum([np.bincount(s.labels, minlength=10) for s in data[:3]], axis=0)
    for part in data[:3]:
        share = whole * len(part.labels) / 1797
        assert np.abs(np.bincount(part.labels, minlength=10) - share).max() <= 2


def test_the_split_is_pinned(data):
    # Published accuracies are of this split.
    digest = hashlib.sha256(data.test.images.tobytes() + data.validation.images.tobytes())
    assert digest.hexdigest()[:16] == "1258bfd9042b66eb"


def test_a_directory_is_refused():
    with pytest.raises(ValueError, match="data.dir='/somewhere': digits come with scikit-learn"):
        digits.load("/somewhere")
