import numpy as np
import pytest

from rigl_optax.data import batches


def split(examples):
    images = np.arange(examples * 4, dtype=np.uint8).reshape(examples, 2, 2)
    return batches.Split(images, np.arange(examples, dtype=np.int32))


def test_a_batch_is_a_function_of_seed_and_step():
    for step in (7, 0, 3, 7):
        expected = batches.batch_indices(103, 10, seed=5, step=step)
        batches._permutation.cache_clear()
        np.testing.assert_array_equal(batches.batch_indices(103, 10, seed=5, step=step), expected)


def test_an_epoch_sees_each_example_at_most_once_and_epochs_differ():
    first, second = (
        np.concatenate([batches.batch_indices(103, 10, seed=1, step=10 * e + i) for i in range(10)])
        for e in (0, 1)
    )
    assert len(set(first)) == len(set(second)) == 100
    assert not np.array_equal(first, second)


def test_seeds_differ():
    drawn = {tuple(batches.batch_indices(50, 50, seed=seed, step=0)) for seed in range(5)}
    assert len(drawn) == 5


def test_the_order_is_pinned():
    # A change of NumPy's generators would change every published run: it must be noticed.
    found = batches.batch_indices(20, 6, seed=3, step=4)
    assert found.tolist() == [2, 15, 6, 4, 12, 3]


def test_training_batch_pairs_images_with_their_labels():
    data = split(20)
    batch = batches.training_batch(data, 5, seed=0, step=2)
    assert batch["images"].dtype == np.uint8
    np.testing.assert_array_equal(batch["images"], data.images[batch["labels"]])


@pytest.mark.parametrize("batch_size", [1, 7, 20, 50])
def test_evaluation_counts_every_example_exactly_once(batch_size):
    data = split(20)
    found = list(batches.evaluation_batches(data, batch_size))
    assert {len(b["labels"]) for b in found} == {batch_size}
    real = np.concatenate([b["labels"][b["weights"] == 1] for b in found])
    np.testing.assert_array_equal(real, data.labels)
    assert sum(b["weights"].sum() for b in found) == 20


@pytest.mark.parametrize("batch_size", [0, -1, 11])
def test_impossible_batch_sizes_are_refused(batch_size):
    with pytest.raises(ValueError, match=f"batch_size={batch_size}: must be from 1 to 10"):
        batches.batch_indices(10, batch_size, seed=0, step=0)


def test_to_float_maps_the_maximum_to_one():
    found = batches.to_float(np.array([0, 8, 16], np.uint8), 16.0)
    np.testing.assert_array_equal(found, np.array([0, 0.5, 1], np.float32))


def test_pixels_are_standardised_by_the_training_split():
    rng = np.random.default_rng(0)
    sizes = {"train": 40, "validation": 7, "test": 5}
    splits = {
        name: batches.Split(rng.integers(0, 17, (n, 3, 3), dtype=np.uint8), np.zeros(n, np.int32))
        for name, n in sizes.items()
    }
    data = batches.standardised(batches.Dataset(**splits, classes=10, maximum=16.0))
    pixels = splits["train"].images / 16
    np.testing.assert_allclose(data.mean, [pixels.mean()], rtol=1e-14)
    np.testing.assert_allclose(data.deviation, [pixels.std()], rtol=1e-14)
    found = batches.normalised({"images": splits["test"].images}, data)
    expected = (splits["test"].images / 16 - pixels.mean()) / pixels.std()
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
