"""Numbers in the docs are those of the runs whose records are in the repository."""

import json
import pathlib
import re
import statistics

import pytest

from rigl_optax.reports import comparison, summary
from rigl_optax.training import methods

ROOT = pathlib.Path(__file__).parents[2]
SPARSITIES = (0.9, 0.95, 0.98)


@pytest.fixture(scope="module")
def records():
    folder = ROOT / "results" / "fashion_mnist_lenet"
    results = {}
    for arm in comparison.arms(list(methods.METHODS), SPARSITIES):
        paths = [folder / f"{arm.folder}-seed{seed}.json" for seed in range(5)]
        results[arm] = [json.loads(path.read_text()) for path in paths]
    return summary.summary(results)


def cells(record, digits=2):
    found = [f"{record['mean']:.{digits}f} ± {record['std']:.{digits}f}", ""]
    if difference := record.get("difference"):
        mean, spread = statistics.mean(difference), statistics.stdev(difference)
        found[1] = f"{mean:+.{digits}f} ± {spread:.{digits}f}"
    return [*found, f"{record['training_flops']:.3f}"]


def test_the_table_of_all_methods(records):
    page = (ROOT / "docs" / "results.md").read_text()
    found = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", page, re.MULTILINE))
    assert found.keys() == set(methods.METHODS) - {"dense"}
    for name, row in found.items():
        own = {r["sparsity"]: r for r in records if r["method"] == name}
        expected = [cell for sparsity in SPARSITIES for cell in cells(own[sparsity])]
        assert [cell.strip() for cell in row.split("|")] == expected, name
    (dense,) = (r for r in records if r["method"] == "dense")
    assert f"Dense: {cells(dense)[0]}." in page


def test_the_table_of_recurrent_language_models():
    folder, sparsities = ROOT / "results" / "tdavid_gru", (0.75, 0.9)
    names = ["dense", "small_dense", "static", "set", "snfs", "rigl", "gmp"]
    results = {}
    for arm in comparison.arms(names, sparsities):
        paths = [folder / f"{arm.folder}-seed{seed}.json" for seed in range(3)]
        results[arm] = [json.loads(path.read_text()) for path in paths]
    found = summary.summary(results)
    page = (ROOT / "docs" / "text.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+)` \| (\d.*) \|$", page, re.MULTILINE))
    assert list(rows) == names[1:]
    for name, row in rows.items():
        own = {r["sparsity"]: r for r in found if r["method"] == name}
        expected = [cell for sparsity in sparsities for cell in cells(own[sparsity], 3)]
        assert [cell.strip() for cell in row.split("|")] == expected, name
    (dense,) = (r for r in found if r["method"] == "dense")
    assert f"Dense: {cells(dense, 3)[0]};" in page


def test_the_table_of_transformers():
    page = (ROOT / "docs" / "transformers.md").read_text()
    expected = {}
    for path in (ROOT / "results" / "tdavid_gpt").glob("*.json"):
        run = json.loads(path.read_text())
        method, flops = run["config"]["method"], run["flops"]
        sparsity = "" if method["name"] == "dense" else f"{100 * method['sparsity']:g} %"
        expected[method["name"], sparsity] = [
            f"{run['validation']['bits_per_byte']:.3f}",
            f"{run['test']['bits_per_byte']:.3f}",
            f"{flops['training'] / flops['training_dense']:.3f}",
            f"{flops['inference'] / flops['inference_dense']:.3f}",
        ]
    rows = re.findall(r"^\| `(\w+)` \| ([\d %]*) \| (\d.*) \|$", page, re.MULTILINE)
    found = {(name, sparsity): numbers.split(" | ") for name, sparsity, numbers in rows}
    assert found == expected


def test_the_summary_is_of_these_records(records):
    path = ROOT / "results" / "fashion_mnist_lenet.json"
    assert json.loads(path.read_text()) == json.loads(json.dumps(records))
