import gzip
import pathlib
import struct

import numpy as np
import pytest

from rigl_optax.data import fashion_mnist

INSTALLED = pathlib.Path(fashion_mnist.DEBIAN_DIR).is_dir()


def write_idx(path, array, magic=None, sizes=None):
    sizes = array.shape if sizes is None else sizes
    magic = 0x0800 + array.ndim if magic is None else magic
    header = struct.pack(f">{1 + len(sizes)}I", magic, *sizes)
    path.write_bytes(gzip.compress(header + array.tobytes(), 1))


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A directory in the real format with 7 + 3 images, 2 of the 7 for validation."""
    generator = np.random.default_rng(0)
    files = {
        split: (images, labels, count)
        for (split, (images, labels, _)), count in zip(
            fashion_mnist.FILES.items(), (7, 3), strict=True
        )
    }
    for images, labels, count in files.values():
        write_idx(tmp_path / images, generator.integers(0, 256, (count, 28, 28), np.uint8))
        write_idx(tmp_path / labels, generator.integers(0, 10, count, np.uint8))
    monkeypatch.setattr(fashion_mnist, "FILES", files)
    monkeypatch.setattr(fashion_mnist, "VALIDATION", 2)
    return tmp_path


def test_reads_what_was_written(small):
    data = fashion_mnist.load(str(small))
    assert [len(s.labels) for s in data[:3]] == [5, 2, 3]
    assert data.train.images.shape == (5, 28, 28) and data.train.images.dtype == np.uint8
    whole = fashion_mnist.read_idx(
        small / "train-images-idx3-ubyte.gz", fashion_mnist.IMAGES_MAGIC, (7, 28, 28)
    )
    np.testing.assert_array_equal(data.train.images, whole[:5])
    np.testing.assert_array_equal(data.validation.images, whole[5:])  # the last of training


@pytest.mark.skipif(not INSTALLED, reason="the Debian package is not installed")
def test_the_debian_package():
    data = fashion_mnist.load()
    assert [len(s.labels) for s in data[:3]] == [55_000, 5_000, 10_000]
    assert np.bincount(data.test.labels).tolist() == [1000] * 10
    assert data.test.labels[:5].tolist() == [9, 2, 1, 1, 6]
    # The published mean of the training pixels is 0.2860 of 255.
    train = np.concatenate([data.train.images, data.validation.images])
    assert abs(train.mean() / 255 - 0.2860) < 5e-5


def test_a_missing_dataset_says_where_it_looked_and_how_to_get_it(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        fashion_mnist.load(str(tmp_path))
    message = str(error.value)
    assert str(tmp_path) in message
    assert "dataset-fashion-mnist" in message
    assert "t10k-labels-idx1-ubyte.gz" in message and "--config.data.dir" in message


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda raw: raw[: len(raw) // 2], "not a complete gzip file"),
        (lambda raw: b"not gzip at all", "not a complete gzip file"),
        (lambda raw: b"", "0 bytes, shorter than its header"),
        (lambda raw: gzip.compress(b"\0\0\x08\x03"), "4 bytes, shorter than its header"),
        (lambda raw: gzip.compress(b"\0\0\x08\x01" + gzip.decompress(raw)[4:]), "magic number"),
        (lambda raw: gzip.compress(gzip.decompress(raw)[:-1]), "too few bytes"),
        (lambda raw: gzip.compress(gzip.decompress(raw) + b"x"), "too many bytes"),
        (
            lambda raw: gzip.compress(
                gzip.decompress(raw)[:4] + struct.pack(">3I", 7, 28, 29) + gzip.decompress(raw)[16:]
            ),
            "sizes",
        ),
    ],
)
def test_a_damaged_file_gives_one_clear_error(small, damage, message):
    path = small / "train-images-idx3-ubyte.gz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=message) as error:
        fashion_mnist.load(str(small))
    assert path.name in str(error.value)


def test_a_label_outside_the_classes_is_refused(small):
    write_idx(small / "t10k-labels-idx1-ubyte.gz", np.array([1, 10, 2], np.uint8))
    with pytest.raises(ValueError, match="label 10; classes are 0 to 9"):
        fashion_mnist.load(str(small))
