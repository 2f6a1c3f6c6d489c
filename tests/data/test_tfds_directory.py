import json
import shutil
import sys

import pytest

from benchmarks.tfds_writer import write
from rigl_optax.data import tfds_directory

EXAMPLES = {
    "train": [(bytes([i]) * (i + 1), i % 3) for i in range(11)],
    "validation": [(b"v%d" % i, 2) for i in range(3)],
}
FORMATS = ("tfrecord", "array_record")


@pytest.fixture(scope="module", params=FORMATS)
def sound(request, tmp_path_factory):
    data_dir = tmp_path_factory.mktemp("tfds")
    write(data_dir, "imagenet2012", EXAMPLES, 3, request.param, shards=3)
    return data_dir


@pytest.fixture
def data_dir(sound, tmp_path):
    shutil.copytree(sound, tmp_path, dirs_exist_ok=True)
    return tmp_path


def find(data_dir):
    return tfds_directory.find(data_dir, "imagenet2012", "COMMAND")


def folder(data_dir):
    return data_dir / "imagenet2012" / "5.1.0"


def change(data_dir, key, value, file="dataset_info.json"):
    path = folder(data_dir) / file
    content = json.loads(path.read_text())
    content[key] = value
    path.write_text(json.dumps(content))


def test_every_record_is_read_in_any_order(sound):
    found = find(sound)
    assert found.classes == 3
    for split, examples in EXAMPLES.items():
        records = found.records(split)
        assert len(records) == len(examples)
        for i in [*reversed(range(len(examples))), 0, 2]:
            assert records.read(i) == examples[i]
    name = found.records("train").name(5)
    assert name.startswith("record 1 of ") and name.endswith("-00001-of-00003")
    assert "tensorflow" not in sys.modules and "tensorflow_datasets" not in sys.modules


def test_the_folder_of_the_version_may_be_given_as_well(sound):
    for place in (sound / "imagenet2012", folder(sound)):
        assert find(place).folder == folder(sound)


def test_the_newest_version_is_taken(data_dir):
    for version in ("10.0.0", "9.9.9"):
        shutil.copytree(folder(data_dir), data_dir / "imagenet2012" / version)
    assert find(data_dir).folder.name == "10.0.0"


def test_older_metadata_name_neither_format_nor_files(tmp_path):
    write(tmp_path, "imagenet2012", EXAMPLES, 3)
    path = folder(tmp_path) / "dataset_info.json"
    info = json.loads(path.read_text())
    del info["fileFormat"]
    for split in info["splits"]:
        del split["filepathTemplate"], split["numBytes"]
    path.write_text(json.dumps(info))
    assert find(tmp_path).records("train").read(4) == EXAMPLES["train"][4]


def test_what_is_missing_is_said_with_the_command(tmp_path):
    with pytest.raises(FileNotFoundError, match="no prepared TFDS dataset imagenet2012.*COMMAND"):
        find(tmp_path)
    # As TFDS names the folder until all of it is written.
    begun = tmp_path / "imagenet2012" / "incomplete.ABC123_5.1.0"
    begun.mkdir(parents=True)
    (begun / "dataset_info.json").write_text("{}")
    with pytest.raises(
        FileNotFoundError, match=r"begun and not finished.*incomplete\.ABC.*COMMAND"
    ):
        find(tmp_path)


def test_missing_files_and_splits_fail_at_once(data_dir):
    with pytest.raises(FileNotFoundError, match="no split 'test'; it has train, validation"):
        find(data_dir).records("test")
    next(folder(data_dir).glob("*train*00001-of*")).unlink()
    with pytest.raises(FileNotFoundError, match="1 of the 3 files of split 'train'.*00001-of"):
        find(data_dir).records("train")


def test_files_that_were_not_copied_to_the_end_fail_at_once(tmp_path):
    write(tmp_path, "imagenet2012", EXAMPLES, 3)
    path = next(folder(tmp_path).glob("*train*00001-of*"))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="have not been copied to the end"):
        find(tmp_path).records("train")


def test_a_file_with_another_number_of_records_is_refused(data_dir):
    info = json.loads((folder(data_dir) / "dataset_info.json").read_text())
    info["splits"][0]["shardLengths"] = ["5", "3", "3"]
    info["splits"][0].pop("numBytes")
    change(data_dir, "splits", info["splits"])
    with pytest.raises(ValueError, match="4 records; 5 by dataset_info.json"):
        find(data_dir).records("train").read(0)


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("fileFormat", "riegeli", "'riegeli'; tfrecord and array_record"),
        ("splits", [{"name": "train"}], "no 'shardLengths'"),
        ("splits", [{"name": "train", "shardLengths": ["-1"]}], "shard lengths"),
        ("splits", 3, "not iterable"),
        (
            "splits",
            [{"name": "../" * 9, "shardLengths": ["1"], "filepathTemplate": "{SPLIT}x"}],
            "a file named",
        ),
    ],
)
def test_metadata_that_make_no_sense_are_refused(data_dir, key, value, problem):
    change(data_dir, key, value)
    with pytest.raises(ValueError, match=problem):
        find(data_dir)


def test_a_dataset_without_classes_is_refused(data_dir):
    change(data_dir, "featuresDict", {"features": {}}, "features.json")
    with pytest.raises(ValueError, match="not those of images.*'label'"):
        find(data_dir)
    (folder(data_dir) / "features.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="not TFDS metadata"):
        find(data_dir)
