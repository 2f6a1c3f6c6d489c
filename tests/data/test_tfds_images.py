import importlib.util
import io
import shutil
import struct
import sys

import numpy as np
import pytest

from rigl_optax.data import fashion_mnist, tfds_images

INSTALLED = importlib.util.find_spec("tensorflow_datasets") is not None
TRAIN, TEST = 12, 4


def write_tfrecord(path, records):
    frame = lambda r: struct.pack("<Q", len(r)) + b"crc1" + r + b"crc2"
    path.write_bytes(b"".join(frame(record) for record in records))


def test_tfrecords_are_read_back(tmp_path):
    records = [b"one", b"", b"three" * 1000]
    write_tfrecord(tmp_path / "x", records)
    assert list(tfds_images.tfrecords(tmp_path / "x")) == records


@pytest.mark.parametrize("keep", [1, 11, 12, 15, 18, 22, 30])
def test_a_tfrecord_file_that_was_cut_off_gives_one_clear_error(tmp_path, keep):
    path = tmp_path / "x"
    write_tfrecord(path, [b"one", b"two"])
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match="cut off within the record at byte"):
        list(tfds_images.tfrecords(path))


def test_a_length_beyond_the_file_is_not_believed(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(struct.pack("<Q", 2**63) + b"crc1")
    with pytest.raises(ValueError, match="cut off within the record at byte 0"):
        list(tfds_images.tfrecords(path))


@pytest.mark.skipif(INSTALLED, reason="tensorflow_datasets is installed")
def test_without_tfds_the_error_says_what_to_install(tmp_path):
    (tmp_path / "fashion_mnist").mkdir()
    with pytest.raises(ImportError, match="tensorflow-datasets array-record"):
        fashion_mnist.load(str(tmp_path))


needs_tfds = pytest.mark.skipif(not INSTALLED, reason="tensorflow_datasets is not installed")


@pytest.fixture(scope="module")
def images():
    generator = np.random.default_rng(0)
    return {
        split: generator.integers(0, 256, (n, 28, 28), np.uint8)
        for split, n in (("train", TRAIN), ("test", TEST))
    }


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, images):
    """A directory that TFDS itself has prepared, as array_record; image i has label i % 10."""
    import tensorflow_datasets as tfds
    from PIL import Image

    class FashionMnist(tfds.core.GeneratorBasedBuilder):
        name = "fashion_mnist"
        VERSION = tfds.core.Version("3.0.1")
        pkg_dir_path = tmp_path_factory.mktemp("package")

        def _info(self):
            image = tfds.features.Image(shape=(28, 28, 1))
            label = tfds.features.ClassLabel(num_classes=10)
            features = tfds.features.FeaturesDict({"image": image, "label": label})
            return self.dataset_info_from_configs(features=features)

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples(split) for split in images}

        def _generate_examples(self, split):
            for i, image in enumerate(images[split]):
                png = io.BytesIO()  # an ndarray would be encoded by TensorFlow
                Image.fromarray(image).save(png, "PNG")
                yield i, {"image": io.BytesIO(png.getvalue()), "label": i % 10}

    data_dir = tmp_path_factory.mktemp("tfds")
    FashionMnist(data_dir=data_dir, file_format="array_record").download_and_prepare()
    return data_dir


@pytest.fixture(scope="module")
def as_tfrecord(prepared, tmp_path_factory):
    """The same examples in tfrecord shards, which TFDS could only write with TensorFlow."""
    from array_record.python import array_record_module

    source = prepared / "fashion_mnist" / "3.0.1"
    data_dir = tmp_path_factory.mktemp("tfds")
    target = data_dir / "fashion_mnist" / "3.0.1"
    target.mkdir(parents=True)
    for path in source.glob("*.json"):
        text = path.read_text().replace("array_record", "tfrecord")
        (target / path.name).write_text(text)
    for path in source.glob("*array_record*"):
        reader = array_record_module.ArrayRecordReader(str(path))
        write_tfrecord(target / path.name.replace("array_record", "tfrecord"), reader.read_all())
        reader.close()
    return data_dir


@needs_tfds
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("file_format", ["prepared", "as_tfrecord"])
def test_a_prepared_directory_is_read_without_tensorflow(file_format, request, images, monkeypatch):
    data_dir = request.getfixturevalue(file_format)
    monkeypatch.setattr(fashion_mnist, "VALIDATION", 2)
    data = fashion_mnist.load(str(data_dir))
    assert [len(s.labels) for s in data[:3]] == [TRAIN - 2, 2, TEST]
    found = {
        "train": [
            np.concatenate(column) for column in zip(data.train, data.validation, strict=True)
        ],
        "test": data.test,
    }
    for split, (got, labels) in found.items():
        # TFDS shuffles what it prepares: compare as sets.
        expected = {(image.tobytes(), i % 10) for i, image in enumerate(images[split])}
        assert {(i.tobytes(), int(label)) for i, label in zip(got, labels, strict=True)} == expected
        assert got.dtype == np.uint8 and labels.dtype == np.int32
    assert "tensorflow" not in sys.modules


@needs_tfds
@pytest.mark.filterwarnings("ignore")
def test_a_record_that_cannot_be_read_is_left_out_and_counted(as_tfrecord, tmp_path, monkeypatch):
    data_dir = tmp_path / "tfds"
    shutil.copytree(as_tfrecord, data_dir)
    (path,) = data_dir.glob("**/*train*tfrecord*")
    records = list(tfds_images.tfrecords(path))
    monkeypatch.setattr(fashion_mnist, "VALIDATION", 2)
    whole = fashion_mnist.load(str(as_tfrecord))
    png = records[3].index(b"PNG")
    records[3] = records[3][:png] + bytes(40) + records[3][png + 40 :]
    records[5] = b"\xff" * len(records[5])
    write_tfrecord(path, records)
    with pytest.raises(ValueError, match=r"record 3 of split 'train' cannot.*max_bad_records=0"):
        fashion_mnist.load(str(data_dir))
    with pytest.raises(ValueError, match=r"record 5 of split 'train' cannot.*max_bad_records=1"):
        fashion_mnist.load(str(data_dir), 1)
    data = fashion_mnist.load(str(data_dir), 2)
    assert [line.split(":")[0] for line in data.left_out] == [
        "fashion_mnist, train, record 3",
        "fashion_mnist, train, record 5",
    ]
    np.testing.assert_array_equal(labels_of(data), np.delete(labels_of(whole), [3, 5]))


def labels_of(data):
    return np.concatenate([data.train.labels, data.validation.labels])
