import numpy as np

from rigl_optax.data import batches, digits, photos, text
from rigl_optax.data.records import Record
from rigl_optax.training import data_fingerprint


class Records:
    """Photos that are too large to be read often."""

    def __init__(self, number, last=b"x"):
        self.number, self.last, self.reads = number, last, 0

    def __len__(self):
        return self.number

    def read(self, i):
        self.reads += 1
        if i == 0:
            raise ValueError("damaged")
        return Record(self.last if i == self.number - 1 else b"photo", i % 2)

    def name(self, i):
        return str(i)


def changed(one, other):
    found, expected = data_fingerprint.of(one), data_fingerprint.of(other)
    return {name for name in expected if found[name] != expected[name]}


def test_images_in_memory():
    data = digits.load()
    assert changed(data, digits.load()) == set()
    labels = data.test.labels.copy()
    labels[7] += 1
    assert changed(data, data._replace(test=data.test._replace(labels=labels))) == {"test"}
    fewer = batches.Split(data.train.images[:-1], data.train.labels[:-1])
    assert changed(data, data._replace(train=fewer, classes=11)) == {"train", "classes"}
    assert data_fingerprint.of(data)["test"].startswith(f"{data.test.examples} examples, ")


def test_texts():
    tokens = np.arange(1_000_000).astype(np.uint8)
    data = text.in_order(tokens)
    assert changed(data, text.in_order(tokens.copy())) == set()
    assert changed(data, text.in_order(tokens[:-1])) != set()
    assert "train" in changed(data, text.in_order(tokens + np.uint8(1)))


def test_photos_of_which_a_few_are_read():
    def dataset(records):
        return photos.dataset(records, Records(50), 2, 0, 8, 1)

    records = Records(1000)
    assert changed(dataset(records), dataset(Records(1000))) == set()
    assert records.reads <= 2 * 16
    assert changed(dataset(records), dataset(Records(1000, b"y"))) <= {"train", "validation"}
    assert changed(dataset(records), dataset(Records(999))) >= {"train"}
