"""The study of the loss landscape runs, and the page shows the tables of its records."""

import json
import pathlib

import pytest

from benchmarks import landscape

ROOT = pathlib.Path(__file__).parents[2]


def test_tables_are_those_of_the_records():
    records = json.loads(landscape.RESULTS.read_text())
    page = (ROOT / "docs" / "landscape.md").read_text()
    for table in landscape.tables(records):
        assert table in page, f"run python -m benchmarks.landscape; it prints\n{table}"


def test_quick_studies_run_and_are_resumed(tmp_path, capsys):
    arguments = ["--quick", f"--results={tmp_path / 'quick.json'}", "--studies=paths,rewirings"]
    landscape.main(arguments)
    (path,) = json.loads((tmp_path / "quick.json").read_text())["paths"].values()
    assert path["from static"]["rigl"]["loss"] < path["ends"]["static"]["loss"]
    # The ends of all ways are the two solutions.
    for losses in path["along"].values():
        assert losses[0] == pytest.approx(path["ends"]["gmp"]["loss"], rel=1e-4)
        assert losses[-1] == pytest.approx(path["ends"]["static"]["loss"], rel=1e-4)
    assert "2 of 2" in capsys.readouterr().out
    landscape.main(arguments)
    assert "2 of 2" not in capsys.readouterr().out
