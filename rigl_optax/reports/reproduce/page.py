"""Writes the tables of a claim as markdown, from the records of its runs."""

import statistics
from collections.abc import Callable, Mapping
from typing import Any

from rigl_optax.reports import styles, summary
from rigl_optax.reports.comparison import Arm
from rigl_optax.reports.reproduce.claims import TUNING_SEED, Experiment
from rigl_optax.reports.reproduce.trials import Found
from rigl_optax.training import score

Row = dict[str, Any]


def table(found: Mapping[Experiment, Found]) -> str:
    """Returns a section for each experiment: accuracies, paired differences, and settings.

    Args:
      found: The runs of each experiment; there is at least one run of each.
    """
    return "\n".join(_section(each, one) for each, one in found.items())


def rows(experiment: Experiment, found: Found) -> list[Row]:
    """Summarises each arm: as `summary.summary`, with `arm`, `rate` and `units` added.

    `units` is the mean number of effective units of the first sparse layer; None without masks.
    """
    arms = [arm for arm, results in found.results.items() if results]
    each = summary.summary(found.results, found.failed, experiment.baseline)
    return [
        row | {"arm": arm, "rate": found.rates[arm], "units": _units(found.results[arm])}
        for arm, row in zip(arms, each, strict=True)
    ]


def label(arm: Arm) -> str:
    """Returns the name of an arm for people, without its sparsity."""
    steps = "" if arm.steps is None else f"{arm.steps:,} steps"
    return ", ".join(filter(None, (styles.of(arm.method).name, arm.name, steps)))


def _units(results: list[Row]) -> float | None:
    counts = [list(result.get("effective_units", {}).values()) for result in results]
    return statistics.mean(each[0] for each in counts) if all(counts) else None


def _section(experiment: Experiment, found: Found) -> str:
    each = rows(experiment, found)
    judged = score.of(each[0], "test_")
    rates = ", ".join(f"{rate:g}" for rate in experiment.rates)
    trials = f"{experiment.tuning_seeds} run{'s' * (experiment.tuning_seeds > 1)}"
    who = "each arm" if all(experiment.tuned_as(a) == a for a in experiment.arms) else "each method"
    lines = [
        f"**{experiment.title}.** Test {judged.title}, mean ± standard deviation of {seeds(each)}. "
        f"The learning rate of {who} at each sparsity is the best of {rates} on validation data, "
        f"in {trials} each from seed {TUNING_SEED} on, which are not in the table.",
        "",
    ]

    lines += scores(each)
    lines += [
        "",
        f"Minus {baseline_name(experiment)}, paired by seed; in brackets the seeds that are ahead:",
        "",
        *differences(each),
        "",
        "Learning rate, training FLOPs (dense: 1), effective units of the first layer, of 300, and "
        "the part of the weights that was ever active:",
        "",
        *settings(each),
        "",
        *explored(each),
    ]
    return "\n".join(lines)


def seeds(each: list[Row]) -> str:
    """Says how many runs the arms have."""
    judged = score.of(each[0], "test_")
    sizes = sorted({len(row[f"test_{judged.key}"]) for row in each})
    if len(sizes) > 1:
        return f"{sizes[0]} to {sizes[-1]} seeds"
    return "one seed" if sizes == [1] else f"{sizes[0]} seeds"


def scores(each: list[Row]) -> list[str]:
    """Returns the lines of the table of scores: mean and standard deviation over seeds."""
    judged = score.of(each[0], "test_")

    def cell(row: Row) -> str:
        spread = "" if row["std"] is None else f" ± {judged.number(row['std'])}"
        failed = f" ({len(row['failed'])} failed)" if "failed" in row else ""
        return judged.number(row["mean"]) + spread + failed

    return _pivot(each, cell)


def differences(each: list[Row]) -> list[str]:
    """Returns the lines of the table of paired differences, and of how many are above 0."""
    judged = score.of(each[0], "test_")

    def cell(row: Row) -> str:
        paired = row["difference"]
        spread = f" ± {judged.number(statistics.stdev(paired))}" if len(paired) > 1 else ""
        ahead = sum(judged.better(d) > 0 for d in paired)
        return f"{judged.number(statistics.mean(paired), '+')}{spread} ({ahead}/{len(paired)})"

    return _pivot([row for row in each if row.get("difference")], cell)


def settings(each: list[Row]) -> list[str]:
    """Returns the lines of the table of learning rates, FLOPs, effective units and coverage."""

    def cell(row: Row) -> str:
        units = "" if row["units"] is None else f", {row['units']:.0f} units"
        seen = f", {row['coverage']:.3f}" if "coverage" in row else ""
        return f"{row['rate']:g}, {row['training_flops']:.3f}{units}{seen}"

    return _pivot(each, cell)


def explored(each: list[Row]) -> list[str]:
    """Says whether arms that try more weights score higher; nothing of fewer than 8 such arms.

    It is asked of arms of one method at one sparsity: others differ in more than what they try.
    """
    seen = [row for row in each if "coverage" in row]
    if len(seen) < 8 or len({(row["method"], row["sparsity"]) for row in seen}) > 1:
        return []
    scores_of = [row["mean"] for row in seen]
    found = statistics.correlation([row["coverage"] for row in seen], scores_of)
    about = f"Over these {len(seen)} arms the correlation of that part with the score is"
    return [f"{about} {found:+z.2f}.", ""]


def baseline_name(experiment: Experiment) -> str:
    """Names what arms are compared with; the method itself where that differs."""
    found = {experiment.baseline(arm) for arm in experiment.arms}
    names = {name for _, name in found}
    if len(found) == 1:
        method, name = found.pop()
        return label(Arm(method, None, name=name))
    return f"{names.pop()} of the same method" if len(names) == 1 else "the same method"


def _pivot(each: list[Row], cell: Callable[[Row], str]) -> list[str]:
    """Lays rows out by arm and sparsity; the corner has what has no sparsity."""
    parts = sorted({row["sparsity"] for row in each if row["sparsity"] is not None})
    without = [row for row in each if row["sparsity"] is None]
    corner = "; ".join(f"{label(row['arm'])}: {cell(row)}" for row in without)
    columns = [f"{100 * part:g} %" for part in parts] or [""]
    lines = [f"| {corner} | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    named: dict[str, dict[float, str]] = {}
    for row in each:
        if row not in without:
            named.setdefault(label(row["arm"]), {})[row["sparsity"]] = cell(row)
    for name, cells in named.items():
        lines.append(f"| {name} | " + " | ".join(cells.get(part, "") for part in parts) + " |")
    return lines
