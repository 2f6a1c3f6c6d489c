import pathlib

import numpy as np
import pytest

from benchmarks.real_photos import png, small
from benchmarks.tfds_writer import write
from rigl_optax.data import augmentation, batches, cifar10

PER_FILE, VALIDATION = 6, 4


@pytest.fixture(autouse=True)
def _few(monkeypatch):
    monkeypatch.setattr(cifar10, "PER_FILE", PER_FILE)
    monkeypatch.setattr(cifar10, "VALIDATION", VALIDATION)


@pytest.fixture(scope="module")
def examples():
    return small(PER_FILE * 6, 32)


def write_binary(folder, images, labels):
    """As https://www.cs.toronto.edu/~kriz/cifar.html tells: label, red, green, blue."""
    for i, name in enumerate([*cifar10.TRAIN, *cifar10.TEST]):
        raw = b""
        for at in range(i * PER_FILE, (i + 1) * PER_FILE):
            planes = [images[at][:, :, channel].tobytes() for channel in range(3)]
            raw += bytes([labels[at]]) + b"".join(planes)
        (folder / name).write_bytes(raw)


@pytest.fixture(params=["binary", "tfrecord", "array_record"])
def data_dir(request, tmp_path, examples):
    if request.param == "binary":
        (tmp_path / cifar10.BINARY).mkdir()
        write_binary(tmp_path / cifar10.BINARY, *examples)
    else:
        encoded = [(png(image), int(label)) for image, label in zip(*examples, strict=True)]
        splits = {"train": encoded[: 5 * PER_FILE], "test": encoded[5 * PER_FILE :]}
        write(tmp_path, "cifar10", splits, 10, request.param)
    return tmp_path


def test_all_forms_hold_the_same_images(data_dir, examples):
    images, labels = examples
    data = cifar10.load(str(data_dir))
    cuts = [5 * PER_FILE - VALIDATION, 5 * PER_FILE]
    for i, split in enumerate((data.train, data.validation, data.test)):
        np.testing.assert_array_equal(split.images, np.split(images, cuts)[i])
        np.testing.assert_array_equal(split.labels, np.split(labels, cuts)[i])
        assert split.labels.dtype == np.int32 and split.standardised
    assert data.classes == 10 and data.bad_records() == ()


def test_each_image_is_standardised_before_it_is_cropped(data_dir):
    # As `tf.image.per_image_standardization`, which the reference applies to the whole image.
    data = cifar10.load(str(data_dir))
    place = {"seed": 0, "step": 0}
    plain, seen = (
        batches.training_batch(data.train, 8, **place, augment=a) for a in ("none", "pad_crop")
    )
    found = np.asarray(batches.normalised(plain, data))
    whole = plain["images"].reshape(8, -1).astype(float)
    centred = whole - whole.mean(1, keepdims=True)
    expected = centred / np.maximum(whole.std(1, keepdims=True), 1 / np.sqrt(32 * 32 * 3))
    np.testing.assert_allclose(found.reshape(8, -1), expected, rtol=1e-4, atol=1e-4)
    cropped = augmentation.augmented(found, "pad_crop", 8, 0, 0)
    np.testing.assert_array_equal(np.asarray(batches.normalised(seen, data)), cropped)
    assert not np.array_equal(cropped, found)


def test_a_constant_image_and_a_filled_up_batch_stay_finite(data_dir):
    data = cifar10.load(str(data_dir))
    data.test.images[0] = 77
    *_, last = batches.evaluation_batches(data.test, 4)
    first = next(batches.evaluation_batches(data.test, 4))
    assert last["weights"].tolist() == [1, 1, 0, 0]
    for batch in (first, last):
        assert np.isfinite(batches.normalised(batch, data)).all()
    np.testing.assert_array_equal(batches.normalised(first, data)[0], 0)


def test_what_is_missing_or_cut_off_fails_at_once(tmp_path, examples):
    for place in ("", str(tmp_path)):
        with pytest.raises(FileNotFoundError, match="tfds build cifar10.*cifar-10-binary.tar.gz"):
            cifar10.load(place)
    write_binary(tmp_path, *examples)
    assert cifar10.load(str(tmp_path)).classes == 10
    third = tmp_path / "data_batch_3.bin"
    raw = third.read_bytes()
    for spoiled, problem in (
        (raw[:-1], "18437 bytes; 18438 for 6 images"),
        (b"\x0a" + raw[1:], "label 10; classes are 0 to 9"),
    ):
        third.write_bytes(spoiled)
        with pytest.raises(ValueError, match=problem):
            cifar10.load(str(tmp_path))
    third.unlink()
    with pytest.raises(FileNotFoundError, match=r"has no data_batch_3\.bin: .tfds build"):
        cifar10.load(str(tmp_path))


def test_pickles_are_not_read(tmp_path):
    (pathlib.Path(tmp_path) / "cifar-10-batches-py").mkdir()
    with pytest.raises(ValueError, match="pickle executes what is in it. Take the binary version"):
        cifar10.load(str(tmp_path))


def test_without_a_directory_nothing_is_looked_for(tmp_path, examples, monkeypatch):
    write_binary(tmp_path, *examples)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="data.dir is empty"):
        cifar10.load("")
