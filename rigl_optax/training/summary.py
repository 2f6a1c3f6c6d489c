"""The table of a comparison: accuracy, paired differences, costs."""

import statistics
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.table import Table

from rigl_optax.training.comparison import Arm, Results

BASELINE = "static"  # what the others are compared with, seed by seed


def summary(results: Results) -> list[dict[str, Any]]:
    """One record per arm: accuracies in percent, costs relative to dense training.

    `difference` is of the test accuracy to that of the baseline at the same sparsity with the
    same seed, in percentage points, seed by seed.
    """
    records = []
    for arm, found in results.items():
        accuracy = [100 * result["test"]["accuracy"] for result in found]
        record: dict[str, Any] = {
            "method": arm.method,
            "sparsity": arm.sparsity,
            "test_accuracy": accuracy,
            "mean": statistics.mean(accuracy),
            "std": statistics.stdev(accuracy) if len(accuracy) > 1 else 0.0,
            "active_weights": sum(found[0]["active_weights"].values()),
            "weights": found[0]["weights"],
        }
        for kind in ("training", "inference"):
            costs = found[0]["flops"]
            record[f"{kind}_flops"] = costs[kind] / costs[f"{kind}_dense"]
        baseline = results.get(Arm(BASELINE, arm.sparsity))
        if baseline and arm.method != BASELINE:
            record["difference"] = [
                a - 100 * b["test"]["accuracy"] for a, b in zip(accuracy, baseline, strict=True)
            ]
        records.append(record)
    return records


def table(records: Sequence[dict[str, Any]], title: str) -> Table:
    """The summary for people; differences are paired, seed by seed."""
    grid = Table(title=title, title_justify="left", box=box.SIMPLE)
    for name in ("sparsity", "method"):
        grid.add_column(name)
    for name in ("test accuracy %", f"minus {BASELINE}", "ahead", "active weights"):
        grid.add_column(name, justify="right", no_wrap=True)
    for name in ("train FLOPs", "inference FLOPs"):
        grid.add_column(name, justify="right", no_wrap=True)
    for record in records:
        paired = ahead = ""
        if difference := record.get("difference"):
            spread = statistics.stdev(difference) if len(difference) > 1 else 0.0
            paired = f"{statistics.mean(difference):+.2f} ± {spread:.2f}"
            ahead = f"{sum(d > 0 for d in difference)} of {len(difference)}"
        grid.add_row(
            "" if record["sparsity"] is None else f"{record['sparsity']:g}",
            record["method"],
            f"{record['mean']:.2f} ± {record['std']:.2f}",
            paired,
            ahead,
            f"{record['active_weights']:,}",
            f"{record['training_flops']:.3f} x",
            f"{record['inference_flops']:.3f} x",
        )
    return grid
