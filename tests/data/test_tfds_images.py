import shutil

import numpy as np
import pytest

from benchmarks.real_photos import png
from benchmarks.tfds_writer import write, write_tfrecord
from rigl_optax.data import fashion_mnist, tf_example

TRAIN, TEST = 12, 4


@pytest.fixture(scope="module")
def images():
    generator = np.random.default_rng(0)
    return {
        split: generator.integers(0, 256, (n, 28, 28), np.uint8)
        for split, n in (("train", TRAIN), ("test", TEST))
    }


@pytest.fixture(scope="module", params=["tfrecord", "array_record"])
def prepared(request, tmp_path_factory, images):
    """Image i has label i % 10."""
    data_dir = tmp_path_factory.mktemp("tfds")
    examples = {
        split: [(png(image), i % 10) for i, image in enumerate(of)] for split, of in images.items()
    }
    write(data_dir, "fashion_mnist", examples, 10, request.param, shards=1)
    return data_dir


@pytest.fixture(autouse=True)
def _two_for_validation(monkeypatch):
    monkeypatch.setattr(fashion_mnist, "VALIDATION", 2)


def test_a_prepared_directory_is_read(prepared, images):
    data = fashion_mnist.load(str(prepared))
    assert [len(s.labels) for s in data[:3]] == [TRAIN - 2, 2, TEST]
    np.testing.assert_array_equal(data.train.images, images["train"][:-2])
    np.testing.assert_array_equal(data.validation.images, images["train"][-2:])
    np.testing.assert_array_equal(data.test.images, images["test"])
    assert labels_of(data).tolist() == [i % 10 for i in range(TRAIN)]
    assert data.train.images.dtype == np.uint8 and data.train.labels.dtype == np.int32


def test_a_record_that_cannot_be_read_is_left_out_and_counted(images, tmp_path):
    examples = [[png(image), i % 10] for i, image in enumerate(images["train"])]
    examples[3][0] = examples[3][0][:60] + bytes(40) + examples[3][0][100:]
    examples[6][0] = png(images["train"][6][:, :20])  # another shape
    examples[8][1] = 10
    splits = {"train": examples, "test": examples[:2]}
    folder = write(tmp_path, "fashion_mnist", splits, 10, shards=1)
    (path,) = folder.glob("*train*tfrecord*")
    raw = bytearray(path.read_bytes())
    raw[-20] ^= 1  # its checksum is not that of record 11 any more
    path.write_bytes(raw)
    for most, record in enumerate((3, 6, 8, 11)):
        problem = rf"record {record} of .*train.* cannot be read.*max_bad_records={most}"
        with pytest.raises(ValueError, match=problem):
            fashion_mnist.load(str(tmp_path), most)
    data = fashion_mnist.load(str(tmp_path), 4)
    reasons = ["damaged", "(28, 20)", "label 10; there are 10", "checksum"]
    for line, record, reason in zip(data.bad_records(), (3, 6, 8, 11), reasons, strict=True):
        assert line.startswith(f"record {record} of ") and reason in line
    np.testing.assert_array_equal(labels_of(data), [0, 1, 2, 4, 5, 7, 9, 0])


def test_a_file_of_something_else_is_refused(prepared, tmp_path):
    shutil.copytree(prepared, tmp_path, dirs_exist_ok=True)
    for path in tmp_path.rglob("*.tfrecord-*"):
        count = TRAIN if "train" in path.name else TEST
        write_tfrecord(path, [tf_example.serialize({"label": 1})] * count)
    for path in tmp_path.rglob("*.array_record-*"):
        path.write_bytes(b"x" * 100)
    with pytest.raises(ValueError, match="copied to the end|: 0 records; 12 by"):
        fashion_mnist.load(str(tmp_path))


def labels_of(data):
    return np.concatenate([data.train.labels, data.validation.labels])
