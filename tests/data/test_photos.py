import numpy as np
import pytest

from benchmarks.real_photos import CLASSES, jpegs
from benchmarks.tfds_writer import write
from rigl_optax.data import batches, crops, decode, image_folder, imagenet, photos
from rigl_optax.data.records import BadRecords, Record

SIZE = 24


class Listed:
    """Records in memory."""

    def __init__(self, records):
        self.records = records

    def __len__(self):
        return len(self.records)

    def read(self, i):
        return Record(*self.records[i])

    def name(self, i):
        return f"record {i}"


@pytest.fixture(scope="module")
def records():
    return jpegs(30)


def make(records, threads=1, most=0):
    members = np.arange(len(records))
    return photos.Photos(Listed(records), members, CLASSES, SIZE, BadRecords(most), threads)


def batch(split, step=0, rows=None, augment="resized_crop", size=12, seed=0):
    return batches.training_batch(split, size, seed=seed, step=step, rows=rows, augment=augment)


def same(found, expected):
    assert found.keys() == expected.keys()
    for key in found:
        np.testing.assert_array_equal(found[key], expected[key])


def test_a_batch_is_what_its_draws_say(records):
    found = batch(make(records), step=3)
    chosen = batches.batch_indices(30, 12, seed=0, step=3)
    for row, drawn in enumerate(crops.draws(12, 0, 3)):
        data, label = records[chosen[row]]
        pixels = decode.stored(data)
        expected = np.empty((SIZE, SIZE, 3), np.uint8)
        window = crops.resized_crop(*pixels.shape[:2], SIZE, drawn)
        decode.photo(data, lambda h, w, window=window: window, expected)
        if crops.is_flipped(drawn):
            expected = expected[:, ::-1]
        np.testing.assert_array_equal(found["images"][row], expected)
        assert found["labels"][row] == label
    assert found["images"].dtype == np.uint8 and found["labels"].dtype == np.int32


def test_a_batch_depends_on_seed_and_step_and_on_nothing_else(records):
    expected = batch(make(records), step=5)
    split = make(records, threads=3)
    for step in (9, 5):  # whatever was read before, on however many threads
        found = batch(split, step=step)
    same(found, expected)
    parts = [batch(split, step=5, rows=r) for r in np.split(np.arange(12), [5, 7])]
    same({k: np.concatenate([p[k] for p in parts]) for k in parts[0]}, expected)
    for other in ({"step": 6}, {"step": 5, "seed": 1}):
        assert not np.array_equal(batch(split, **other)["images"], expected["images"])


def test_without_augmentation_the_centre_is_seen_in_training_as_well(records):
    split = make(records)
    whole = next(batches.evaluation_batches(split, 30))
    found = batch(split, augment="none")
    chosen = batches.batch_indices(30, 12, seed=0, step=0)
    np.testing.assert_array_equal(found["images"], whole["images"][chosen])


@pytest.mark.parametrize("size", [7, 15, 30, 64])
def test_evaluation_counts_every_photo_once(records, size):
    split = make(records, threads=2)
    found = list(batches.evaluation_batches(split, size))
    assert {len(b["labels"]) for b in found} == {size}
    weights = np.concatenate([b["weights"] for b in found])
    assert weights.sum() == 30 and weights.dtype == np.float32
    labels = np.concatenate([b["labels"] for b in found])[weights == 1]
    assert labels.tolist() == [label for _, label in records]
    halves = [list(batches.evaluation_batches(split, 8, r)) for r in np.split(np.arange(8), 2)]
    together = [np.concatenate([a["images"], b["images"]]) for a, b in zip(*halves, strict=True)]
    whole = [b["images"] for b in batches.evaluation_batches(split, 8)]
    np.testing.assert_array_equal(together, whole)


def spoiled(records, *bad):
    return [
        (b"no photo", label) if i in bad else (d, label) for i, (d, label) in enumerate(records)
    ]


def test_the_next_photo_takes_the_place_of_one_that_cannot_be_read(records):
    chosen = batches.batch_indices(30, 12, seed=0, step=1)
    bad = int(chosen[4])
    split = make(spoiled(records, bad), threads=2, most=1)
    found, sound = batch(split, step=1), batch(make(records), step=1)
    for key in found:
        np.testing.assert_array_equal(np.delete(found[key], 4, 0), np.delete(sound[key], 4, 0))
    assert found["labels"][4] == records[(bad + 1) % 30][1]
    # On another host, after a restart: the same, from this part of the batch alone.
    again = make(spoiled(records, bad), most=1)
    same(batch(again, step=1, rows=np.array([4])), {k: x[4:5] for k, x in found.items()})
    for looked in (split, again):
        (line,) = looked.bad_records.lines()
        assert line.startswith(f"record {bad}: not a PNG or JPEG")


def test_one_too_many_that_cannot_be_read_is_an_error(records):
    split = make(spoiled(records, 3, 4, 5), threads=2, most=2)
    with pytest.raises(ValueError, match=r"record \d cannot be read \(not a.*max_bad_records=2"):
        for step in range(3):
            batch(split, step=step)
    with pytest.raises(ValueError, match="no photo of the split can be read"):
        batch(make(spoiled(records[:12], *range(12)), most=12))


def test_in_evaluation_what_cannot_be_read_does_not_count(records):
    split = make(spoiled(records, 7, 29), most=2)
    for _ in range(2):  # one that is met again counts once
        found = list(batches.evaluation_batches(split, 8))
    weights = np.concatenate([b["weights"] for b in found])
    assert np.flatnonzero(weights[:30] == 0).tolist() == [7, 29] and weights[30:].sum() == 0
    assert [line[:9] for line in split.bad_records.lines()] == ["record 7:", "record 29"]


def test_a_label_that_is_none_is_a_bad_record(records):
    for label in (-1, CLASSES):
        split = make([(records[0][0], label), *records[1:]])
        with pytest.raises(
            ValueError, match=f"record 0 cannot be read .label {label}; there are 4"
        ):
            list(batches.evaluation_batches(split, 30))


@pytest.fixture(scope="module", params=["tfrecord", "array_record", "image_folder"])
def on_disk(request, records, tmp_path_factory):
    """A directory of each kind with the same photos, and the function that reads it."""
    root = tmp_path_factory.mktemp("photos")
    train, test = records[:24], records[24:]
    if request.param == "image_folder":
        for part, examples in (("train", train), ("val", test)):
            for i, (data, label) in enumerate(examples):
                folder = root / part / f"class{label}"
                folder.mkdir(parents=True, exist_ok=True)
                (folder / f"{i:03}.JPEG").write_bytes(data)
        (root / "train" / "class0" / "notes.txt").write_text("no photo")
        return root, image_folder.load
    splits = {"train": train, "validation": test}
    write(root, "imagenet2012", splits, CLASSES, request.param)
    return root, imagenet.load


def test_a_dataset_has_three_disjoint_splits_of_all_photos(on_disk, records):
    root, load = on_disk
    data = load(str(root), 0, SIZE, 2)
    assert (data.classes, data.maximum, data.bad_records()) == (CLASSES, 255.0, ())
    assert [s.examples for s in data[:3]] == [22, 2, 6]
    for fraction, examples in ((0.01, 1), (0.25, 6)):
        assert load(str(root), 0, SIZE, 1, fraction).validation.examples == examples
    assert data.train.image_shape == (SIZE, SIZE, 3)
    assert sorted([*data.train.members, *data.validation.members]) == list(range(24))
    whole = next(batches.evaluation_batches(make(records), 30))
    expected = {
        (image.tobytes(), int(n)) for image, n in zip(whole["images"], whole["labels"], strict=True)
    }
    seen = set()
    for split in data[:3]:
        found = next(batches.evaluation_batches(split, split.examples))
        seen |= {
            (i.tobytes(), int(n)) for i, n in zip(found["images"], found["labels"], strict=True)
        }
    assert seen == expected and len(expected) == 30
    np.testing.assert_array_equal(data.train.members, load(str(root), 0, SIZE, 1).train.members)


def test_channels_are_normalised_on_the_device(on_disk):
    root, load = on_disk
    data = load(str(root), 0, SIZE, 1)
    found = next(batches.evaluation_batches(data.test, 6))
    expected = (found["images"] / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(batches.normalised(found, data), expected, rtol=1e-5, atol=1e-5)


def test_a_small_tree_is_read_once_before_training(records, monkeypatch):
    train, test = Listed(spoiled(records[:24], 20)), Listed(spoiled(records[24:], 5))
    with pytest.raises(ValueError, match="record 20 cannot be read"):
        photos.dataset(train, test, CLASSES, 0, SIZE, 2)
    assert len(photos.dataset(train, test, CLASSES, 2, SIZE, 2).bad_records()) == 2
    with monkeypatch.context() as patch:  # a large one is not: that would take too long
        patch.setattr(photos, "CHECKED", 29)
        assert photos.dataset(train, test, CLASSES, 0, SIZE, 2).bad_records() == ()
    monkeypatch.setattr(photos, "CHECKED_BYTES", 1)
    assert photos.dataset(train, test, CLASSES, 2, SIZE, 2).bad_records() == ()


@pytest.mark.parametrize(
    ("photos_there", "held_out"),
    [(9, 1), (160, 16), (4_000, 400), (20_000, 500), (60_000, 600), (1_281_167, 12_812)],
)
def test_how_many_are_held_out_for_validation(photos_there, held_out, monkeypatch):
    records = range(photos_there)  # only their number is asked for
    monkeypatch.setattr(photos, "CHECKED", 0)
    assert photos.dataset(records, records, 2, 0, SIZE, 1).validation.examples == held_out


@pytest.mark.parametrize("load", [imagenet.load, image_folder.load])
def test_what_is_missing_is_said_with_what_to_do(load, tmp_path):
    for place in ("", str(tmp_path), str(tmp_path / "nowhere")):
        with pytest.raises(FileNotFoundError, match="tfds build imagenet2012|tar -xf"):
            load(place, 0, SIZE, 1)


def test_a_tree_whose_parts_do_not_fit_is_refused(on_disk, records, tmp_path):
    for path, problem in (
        ("train/a/1.txt", "no folders|holds no photos"),
        ("val/a/1.jpeg", "holds no photos"),
        ("train/a/1.jpeg", "1 photos for training and 1 for tests"),
        ("val/b/1.jpeg", r"classes that the training photos have not: \['b'\]"),
    ):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(records[0][0])
        with pytest.raises((ValueError, FileNotFoundError), match=problem):
            image_folder.load(str(tmp_path), 0, SIZE, 1)


def test_hidden_names_are_no_classes_and_no_photos(records, tmp_path):
    for part in ("train", "val"):
        for label in range(2):
            for i in range(4):
                path = tmp_path / part / f"class{label}" / f"{i}.jpeg"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(records[i][0])
    for name in (".ipynb_checkpoints/0.jpeg", "class0/._0.jpeg", "class1/.trash/0.jpeg"):
        path = tmp_path / "train" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"no photo")
    (tmp_path / "val" / ".ipynb_checkpoints").mkdir()
    data = image_folder.load(str(tmp_path), 0, SIZE, 1)
    assert data.classes == 2
    assert data.train.examples + data.validation.examples == data.test.examples == 8
    found = next(batches.evaluation_batches(data.test, 8))
    assert found["labels"].tolist() == [0, 0, 0, 0, 1, 1, 1, 1]


def test_a_class_without_photos_is_said(records, tmp_path, caplog):
    for part in ("train", "val"):
        for i in range(4):
            path = tmp_path / part / "a" / f"{i}.jpeg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(records[i][0])
    (tmp_path / "train" / "b").mkdir()
    assert image_folder.load(str(tmp_path), 0, SIZE, 1).classes == 2
    assert "train has 1 classes without a photo (b); they are counted" in caplog.text
