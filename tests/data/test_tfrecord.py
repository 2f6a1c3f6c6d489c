import numpy as np
import pytest

from benchmarks.tfds_writer import frame, write_tfrecord
from rigl_optax.data import tf_example, tfrecord

# Written by TensorFlow 2.21: an example of image b"abc" and label 7; a file of it and of b"".
EXAMPLE = "0a220a100a05696d61676512070a050a036162630a0e0a056c6162656c12051a030a0107"
FILE = f"2400000000000000422b804d{EXAMPLE}1e0d93af" + "0000000000000000" + "29039807" + "d8ea82a2"
RECORDS = [b"one", b"", b"three" * 1000]


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "x.tfrecord"
    write_tfrecord(path, RECORDS)
    return path


def read_all(path):
    return [tfrecord.read(path, *map(int, row)) for row in tfrecord.index(path)]


def test_a_file_of_tensorflow_is_read(tmp_path):
    path = tmp_path / "x.tfrecord"
    path.write_bytes(bytes.fromhex(FILE))
    assert read_all(path) == [bytes.fromhex(EXAMPLE), b""]
    assert tf_example.image_and_label(bytes.fromhex(EXAMPLE)) == (b"abc", 7)
    assert tf_example.serialize({"image": b"abc", "label": 7}).hex() == EXAMPLE
    assert b"".join(map(frame, read_all(path))).hex() == FILE  # what the other tests write


def test_records_are_read_at_random(path):
    places = tfrecord.index(path)
    assert places[:, 1].tolist() == [3, 0, 5000]
    for i in (2, 0, 1, 2):
        assert tfrecord.read(path, *map(int, places[i])) == RECORDS[i]


@pytest.mark.parametrize("keep", [1, 11, 12, 15, 18, 22, 34, 36, 40, 5050])
def test_a_file_that_was_cut_off_gives_one_clear_error(path, keep):
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"cut off within the record at byte (0|19|35)$"):
        tfrecord.index(path)


def test_a_length_beyond_the_file_is_not_believed(path):
    path.write_bytes(frame(b"one") + b"\xff" * 8 + frame(b"")[8:])
    with pytest.raises(ValueError, match="length of the record at byte 19 is wrong"):
        tfrecord.index(path)
    length = np.uint64(2**63).tobytes()
    path.write_bytes(length + np.uint32(tfrecord.masked_crc(length)).tobytes() + b"x")
    with pytest.raises(ValueError, match="cut off within the record at byte 0"):
        tfrecord.index(path)


@pytest.mark.parametrize("at", [12, 13, 14, 15, 18])
def test_every_changed_byte_of_a_record_is_noticed(path, at):
    places = tfrecord.index(path)
    raw = bytearray(path.read_bytes())
    raw[at] ^= 4
    path.write_bytes(raw)
    with pytest.raises(ValueError, match="checksum of the record at byte 0 is wrong"):
        tfrecord.read(path, *map(int, places[0]))
    assert tfrecord.read(path, *map(int, places[2])) == RECORDS[2]


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        (b"\xff" * 9, "not a tf.train.Example"),
        (b"", "0 images and 0 labels"),
        (tf_example.serialize({"image": b"x"}), "1 images and 0 labels"),
        (tf_example.serialize({"image": 3, "label": 3}), "0 images and 1 labels"),
    ],
)
def test_what_is_no_example_of_an_image_is_refused(record, problem):
    with pytest.raises(ValueError, match=problem):
        tf_example.image_and_label(record)
