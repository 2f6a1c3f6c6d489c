"""Makes the table of a comparison: accuracy or bits per byte, paired differences, costs."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from rich import box
from rich.table import Table

from rigl_optax.reports.comparison import Arm, Results
from rigl_optax.training import score, sparsity

Baseline = Callable[[Arm], tuple[str, str]]
BASELINE = "static"  # the method that the others are compared with, seed by seed


def summary(
    results: Results,
    failed: Mapping[Arm, Sequence[int]] = MappingProxyType({}),
    baseline: Baseline = lambda arm: (BASELINE, arm.name),
) -> list[dict[str, Any]]:
    """Summarises the runs of each arm in one record, over its seeds.

    Scores are accuracies in percent, or bits per byte. FLOPs are means, relative to those of the
    dense network. `std` is None for one seed, which has no spread. `failed` lists the seeds that
    ended without a result, if any. `difference` is the test score minus that of the baseline at
    the same sparsity and structure with the same seed: one number for each seed that both have.
    Training FLOPs of an arm with other steps, of whatever batch, are relative to dense training for
    the steps and the batch of those without, too.

    Args:
      results: From `comparison.run_all`; an arm without any result is left out.
      failed: From `comparison.failures`.
      baseline: `baseline(arm)` returns the method and the name of the arm, at the same sparsity and
        structure, that an arm is compared with.
    """
    records = []
    usual = _examples(results)
    for arm, found in results.items():
        if not found:
            continue
        judged = score.of(found[0]["test"])
        values = [judged.value(result["test"]) for result in found]
        record: dict[str, Any] = {
            "method": arm.method,
            **({"structure": shape} if (shape := sparsity.describe(arm.structure)) else {}),
            "sparsity": arm.sparsity,
            **({"steps": arm.steps} if arm.steps is not None else {}),
            **({"name": arm.name} if arm.name else {}),
            f"test_{judged.key}": values,
            "mean": statistics.mean(values),
            "std": _spread(values),
            "active_weights": round(
                statistics.mean(sum(result["active_weights"].values()) for result in found)
            ),
            "weights": found[0]["weights"],
            **({"failed": list(failed[arm])} if failed.get(arm) else {}),
        }
        for kind in ("training", "inference"):
            costs = [result["flops"] for result in found]
            record[f"{kind}_flops"] = statistics.mean(c[kind] / c[f"{kind}_dense"] for c in costs)
        if arm.steps is not None and usual is not None:
            batch = found[0]["config"].get("batch_size", 1)
            record["training_flops"] *= arm.steps * batch / usual
        coverage = [result["coverage"] for result in found if result.get("coverage") is not None]
        if coverage:
            record["coverage"] = statistics.mean(coverage)
        other = _baseline(results, arm, *baseline(arm))
        if other is not None and other != arm:
            others = {b["config"]["seed"]: judged.value(b["test"]) for b in results[other]}
            pairs = zip(found, values, strict=True)
            record["difference"] = [
                a - others[r["config"]["seed"]] for r, a in pairs if r["config"]["seed"] in others
            ]
        records.append(record)
    return records


def _baseline(results: Results, arm: Arm, method: str, name: str) -> Arm | None:
    """Returns the arm that one is compared with; None if there is none of that name."""
    wanted = Arm(method, arm.sparsity, arm.structure, None, name)
    return next((other for other in results if other._replace(changes=()) == wanted), None)


def table(records: Sequence[dict[str, Any]], title: str) -> Table:
    """Lays the summary out for people; differences are paired, seed by seed."""
    grid = Table(title=title, title_justify="left", box=box.SIMPLE, pad_edge=False)
    for name in ("sparsity", "method"):
        grid.add_column(name, no_wrap=True)
    judged = score.of(records[0], "test_") if records else score.ACCURACY
    numbers = (
        f"test\n{judged.label} {judged.unit}".rstrip(),
        "seeds",
        f"minus\n{BASELINE}",
        "ahead",
        "active\nweights",
    )
    for name in (*numbers, "training\nFLOPs", "inference\nFLOPs", "explored"):
        grid.add_column(name, justify="right", no_wrap=True)
    for record in records:
        paired = ahead = ""
        if difference := record.get("difference"):
            paired = judged.number(statistics.mean(difference), "+")
            paired += _plus_minus(judged, _spread(difference))
            ahead = f"{sum(judged.better(d) > 0 for d in difference)}/{len(difference)}"
        grid.add_row(
            "" if record["sparsity"] is None else f"{record['sparsity']:g}",
            f"{record['method']} {record.get('structure', '')}".rstrip()
            + (f", {record['name']}" if "name" in record else "")
            + (f", {record['steps']:,} steps" if "steps" in record else ""),
            judged.number(record["mean"]) + _plus_minus(judged, record["std"]),
            str(len(record[f"test_{judged.key}"]))
            + (f" ({len(record['failed'])} failed)" if "failed" in record else ""),
            paired,
            ahead,
            f"{record['active_weights']:,}",
            f"{record['training_flops']:.3f} x",
            f"{record['inference_flops']:.3f} x",
            f"{record['coverage']:.2f}" if "coverage" in record else "",
        )
    return grid


def _examples(results: Results) -> int | None:
    """Returns how many examples the first arm without a number of steps trains on; or None."""
    for arm, found in results.items():
        if found and arm.steps is None and "steps" in found[0]["config"]:
            config = found[0]["config"]
            return int(config["steps"] * config.get("batch_size", 1))
    return None


def _spread(values: Sequence[float]) -> float | None:
    """Computes the standard deviation; None for one value."""
    return statistics.stdev(values) if len(values) > 1 else None


def _plus_minus(judged: score.Score, spread: float | None) -> str:
    return "" if spread is None else f" ± {judged.number(spread)}"
