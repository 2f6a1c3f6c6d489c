"""The study of circuits runs, and its page shows the tables of its records."""

import json
import pathlib

from benchmarks import circuit

ROOT = pathlib.Path(__file__).parents[2]


def test_tables_are_those_of_the_records():
    page = (ROOT / "docs" / "circuits.md").read_text()
    for table in circuit.tables(json.loads(circuit.RESULTS.read_text())):
        assert table in page, f"run python -m benchmarks.circuit; it prints\n{table}"


def test_the_quick_study_runs_and_is_resumed(tmp_path, monkeypatch, capsys):
    results, figure = tmp_path / "quick.json", tmp_path / "circuit.png"
    arguments = ["--quick", f"--workdir={tmp_path}", f"--results={results}", f"--figure={figure}"]
    circuit.main(arguments)
    (record,) = json.loads(results.read_text()).values()
    printed = capsys.readouterr().out
    assert f"{record['bits_per_byte']:.3f} bits per byte" in printed
    assert figure.stat().st_size > 1_000
    # 1 % of each kernel of the blocks, all of the rest.
    assert record["weights"] == 16 * (256 + 256 + 3) + sum(
        n - int(n * circuit.READ) for n in (16 * 48, 16 * 16, 16 * 64, 64 * 16)
    )
    assert len(record["edges"]) <= record["owned"]
    monkeypatch.setattr(circuit, "train", None)  # what is there is not made again
    circuit.main(arguments)
    assert json.loads(results.read_text()) == {f"{circuit.READ:g}": record}
