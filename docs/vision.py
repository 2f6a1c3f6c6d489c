"""Writes the table of docs/vision.md from the records of its runs.

python docs/vision.py
"""

import json
import pathlib
import statistics
from typing import Any

from rigl_optax.reports import comparison, summary

ROOT = pathlib.Path(__file__).parents[1]
PAGE = ROOT / "docs" / "vision.md"
RECORDS = ROOT / "results" / "fashion_mnist_wrn"
METHODS, SPARSITIES, SEEDS = ("dense", "static", "rigl"), (0.9, 0.95), 3
BEGIN, END = "these lines -->\n", "<!-- end -->"
IMAGES = "fashion_mnist_wrn"


def page() -> str:
    """The page, with the table of the records there are."""
    text = PAGE.read_text()
    before, rest = text.split(BEGIN)
    return before + BEGIN + _table() + END + rest.split(END)[1]


def _table() -> str:
    results: dict[comparison.Arm, list[dict[str, Any]]] = {}
    for arm in comparison.arms(METHODS, SPARSITIES):
        paths = [RECORDS / f"{arm.folder}-seed{seed}.json" for seed in range(SEEDS)]
        if not all(path.exists() for path in paths):
            return "The runs have not finished.\n"
        results[arm] = [json.loads(path.read_text()) for path in paths]
    found = summary.summary(results)
    (dense,) = (r for r in found if r["method"] == "dense")
    heads = " | ".join(
        f"{100 * s:g} %: accuracy | minus static | training FLOPs" for s in SPARSITIES
    )
    lines = [
        f"Dense: {_accuracy(dense)}.",
        "",
        f"| method | {heads} |",
        "|---" * (1 + 3 * len(SPARSITIES)) + "|",
    ]
    for name in METHODS[1:]:
        own = {r["sparsity"]: r for r in found if r["method"] == name}
        cells = [cell for sparsity in SPARSITIES for cell in _cells(own[sparsity])]
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    lines += [
        "",
        f"![Validation accuracy](images/{IMAGES}_learning_curves.png)",
        f"![Accuracy against training FLOPs](images/{IMAGES}_accuracy_against_cost.png)",
    ]
    return "\n".join(lines) + "\n"


def _accuracy(record: dict[str, Any]) -> str:
    return f"{record['mean']:.2f} ± {record['std']:.2f}"


def _cells(record: dict[str, Any]) -> list[str]:
    difference = record.get("difference")
    paired = ""
    if difference:
        paired = f"{statistics.mean(difference):+.2f} ± {statistics.stdev(difference):.2f}"
    return [_accuracy(record), paired, f"{record['training_flops']:.3f}"]


if __name__ == "__main__":
    PAGE.write_text(page())
