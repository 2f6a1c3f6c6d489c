import numpy as np
import pytest

from benchmarks.real_photos import jpegs, png
from benchmarks.tfds_writer import write
from rigl_optax.data import photos, tfds
from rigl_optax.training import config as config_lib
from rigl_optax.training import tasks


def images(count, shape, seed):
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), np.uint8)


def encoded(of, labels):
    return [(png(image), int(label)) for image, label in zip(of, labels, strict=True)]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Colour images of one shape, with a split for validation, in a builder's config."""
    data_dir = tmp_path_factory.mktemp("small")
    splits = {
        name: images(count, (8, 6, 3), seed)
        for seed, (name, count) in enumerate((("train", 20), ("validation", 3), ("test", 5)))
    }
    examples = {name: encoded(of, np.arange(len(of)) % 4) for name, of in splits.items()}
    write(data_dir, "petals/tiny", examples, 4, "array_record", shape=(8, 6, 3), image="picture")
    return data_dir, splits


def load(data_dir, name="petals/tiny", size=0, fraction=0.0):
    return tfds.load(name, str(data_dir), 0, size, 1, fraction)


def test_images_of_one_shape_are_in_memory_with_their_own_splits(small):
    data_dir, splits = small
    data = load(data_dir)
    for split in ("train", "validation", "test"):
        np.testing.assert_array_equal(getattr(data, split).images, splits[split])
        np.testing.assert_array_equal(
            getattr(data, split).labels, np.arange(len(splits[split])) % 4
        )
    assert data.classes == 4 and data.maximum == 255


def test_a_fraction_is_held_out_instead(small):
    data_dir, splits = small
    data = load(data_dir, fraction=0.25)
    np.testing.assert_array_equal(data.train.images, splits["train"][:15])
    np.testing.assert_array_equal(data.validation.images, splits["train"][15:])


def test_without_test_the_validation_split_is_the_test(tmp_path):
    of = images(30, (5, 5), 1)
    examples = {"train": encoded(of, [0] * 30), "validation": encoded(of[:4], [1] * 4)}
    write(tmp_path, "leaves", examples, 2, shape=(5, 5, 1), label="kind")
    data = load(tmp_path, "leaves")
    np.testing.assert_array_equal(data.test.images, of[:4])
    np.testing.assert_array_equal(data.validation.images, of[27:])
    np.testing.assert_array_equal(data.train.images, of[:27])


def test_photos_of_many_shapes_stay_in_their_files(tmp_path):
    examples = jpegs(14)
    write(tmp_path, "scenes", {"train": examples[:10], "test": examples[10:]}, 5)
    data = load(tmp_path, "scenes", size=16)
    assert isinstance(data.train, photos.Photos) and data.train.image_shape == (16, 16, 3)
    assert [s.examples for s in (data.train, data.validation, data.test)] == [9, 1, 4]
    with pytest.raises(ValueError, match=r"image_size=0: photos of tfds/scenes.*as 224"):
        load(tmp_path, "scenes")


def test_large_sets_stay_in_their_files(small, monkeypatch):
    monkeypatch.setattr(tfds, "IN_MEMORY", 25 * 8 * 6 * 3 - 1)
    assert isinstance(load(small[0], size=4).train, photos.Photos)


def test_what_is_missing_is_said(small, tmp_path):
    with pytest.raises(FileNotFoundError, match="dir is empty. For tfds/petals/tiny: .pip install"):
        load("")
    with pytest.raises(
        FileNotFoundError, match="no prepared TFDS dataset roses.*rigl-optax prepare roses"
    ):
        load(small[0], "roses")
    write(tmp_path, "alone", {"train": [(b"x", 0)]}, 1, shape=(2, 2, 3))
    with pytest.raises(FileNotFoundError, match="has the splits train; wanted are train, and test"):
        load(tmp_path, "alone")


def config_of(data_dir, **data):
    values = {"name": "tfds/petals/tiny", "dir": str(data_dir), **data}
    return config_lib.from_mapping({"steps": 4, "batch_size": 4, "data": values})


def test_a_run_takes_one_by_its_name(small):
    config = config_of(small[0], validation=0.1)
    tasks.check(config)
    task = tasks.find(config)
    assert task.image_shape == (8, 6, 3) and task.facts.classes == 4
    assert task.training_batch(config, 0)["images"].shape == (4, 8, 6, 3)
    resized = tasks.find(config_of(small[0], image_size=5))
    assert resized.image_shape == (5, 5, 3)


def test_photos_are_not_cropped_like_small_images(tmp_path):
    examples = jpegs(14)
    write(tmp_path, "petals/tiny", {"train": examples[:10], "test": examples[10:]}, 5)
    with pytest.raises(ValueError, match="'pad_crop': for tfds/petals/tiny it is none or resized"):
        tasks.find(config_of(tmp_path, augment="pad_crop", image_size=16))


def test_a_name_has_to_follow(small):
    with pytest.raises(ValueError, match="data.name='tfds/': must be one of .*tfds/NAME"):
        tasks.check(config_of(small[0], name="tfds/"))
