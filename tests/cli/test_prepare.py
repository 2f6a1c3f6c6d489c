import importlib.util
import pathlib
import sys
import types

import pytest

import rigl_optax_cli
from benchmarks.real_photos import jpegs
from benchmarks.tfds_writer import write


@pytest.fixture
def packages(monkeypatch):
    """Which of the two packages seem to be installed; TFDS writes a set as it would."""
    asked = []

    class Builder:
        def __init__(self, name, data_dir, file_format):
            self.name, self.data_dir, self.file_format = name, data_dir, file_format
            asked.append((name, file_format))

        def download_and_prepare(self):
            examples = jpegs(3)
            splits = {"train": examples[:2], "test": examples[2:]}
            write(pathlib.Path(self.data_dir), self.name, splits, 7, self.file_format)

    module = types.ModuleType("tensorflow_datasets")
    module.builder = Builder
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", module)
    installed = {"tensorflow_datasets", "tensorflow"}
    find = importlib.util.find_spec

    def find_spec(name, *rest):
        if name in ("tensorflow_datasets", "tensorflow"):
            return object() if name in installed else None
        return find(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    return installed, asked


def test_a_set_is_prepared_once_in_a_form_that_is_read_without_tensorflow(
    packages, tmp_path, capsys
):
    words = ["prepare", "ponds", f"--data_dir={tmp_path}"]
    assert rigl_optax_cli.main(words) == 0
    told = capsys.readouterr().out
    assert "7 classes; train 2, test 1" in told and "--config.data.name=tfds/ponds" in told
    assert rigl_optax_cli.main(words) == 0
    assert packages[1] == [("ponds", "array_record")]


def test_what_it_needs_is_said_before_it_starts(packages, tmp_path, capsys):
    packages[0].discard("tensorflow")
    assert rigl_optax_cli.main(["prepare", "lakes", f"--data_dir={tmp_path}"]) == 0
    assert capsys.readouterr().out.startswith("TensorFlow is not installed: sets whose")
    packages[0].clear()
    assert rigl_optax_cli.main(["prepare", "seas", f"--data_dir={tmp_path}"]) == 2
    told = capsys.readouterr().err
    assert "pip install tensorflow-datasets tensorflow" in told and told.count("\n") == 1


def test_a_set_has_to_be_named(tmp_path, capsys):
    assert rigl_optax_cli.main(["prepare", f"--data_dir={tmp_path}"]) == 2
    assert "name" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "status", "told"),
    [
        (ModuleNotFoundError("No module", name="pandas"), 2, "pip install pandas"),
        (
            ConnectionError("no route\nto host"),
            1,
            "could not prepare isles: ConnectionError: no route",
        ),
    ],
)
def test_what_goes_wrong_in_tfds_is_one_line(error, status, told, packages, tmp_path, capsys):
    def builder(*_, **__):
        raise error

    sys.modules["tensorflow_datasets"].builder = builder
    assert rigl_optax_cli.main(["prepare", "isles", f"--data_dir={tmp_path}"]) == status
    (line,) = capsys.readouterr().err.splitlines()
    assert told in line
