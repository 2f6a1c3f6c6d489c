"""Writes the table and the figure of docs/structures.md from the records of its runs.

python docs/structured.py
"""

import json
import pathlib
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

from rigl_optax.reports import comparison, summary
from rigl_optax.training import config as config_lib
from rigl_optax.training import score, sparsity

ROOT = pathlib.Path(__file__).parents[1]
PAGE = ROOT / "docs" / "structures.md"
FIGURE = ROOT / "docs" / "images" / "structures.png"
BEGIN, END = "these lines -->\n", "<!-- end -->"
SECONDS = "seconds.json"  # of `benchmarks/structures.py`


class Network(NamedTuple):
    """What is compared, and where its records are."""

    title: str
    records: pathlib.Path
    sparsity: float
    structures: Sequence[config_lib.Structure]
    seeds: int


def _blocks(rows: int, cols: int, **more: bool) -> config_lib.Structure:
    return config_lib.Structure("block", options={"rows": rows, "cols": cols, **more})


SINGLE = config_lib.Structure()
NETWORKS = (
    Network(
        "MLP 784-1024-1024-10 on Fashion-MNIST",
        ROOT / "results" / "fashion_mnist_mlp",
        0.95,
        (
            SINGLE,
            config_lib.Structure("constant_fan_in"),
            _blocks(16, 16, pad=True),
            _blocks(32, 32, pad=True),
            _blocks(8, 64, pad=True),
        ),
        5,
    ),
    Network(
        "GRU of 256 units on the Treasury of David",
        ROOT / "results" / "tdavid_gru",
        0.9,
        (SINGLE, _blocks(16, 16), _blocks(32, 32)),
        3,
    ),
)


def page() -> str:
    """The page, with the table of the records there are."""
    before, rest = PAGE.read_text().split(BEGIN)
    tables = "\n".join(map(_table, NETWORKS))
    return before + BEGIN + tables + END + rest.split(END)[1]


def _results(network: Network) -> comparison.Results:
    arms = comparison.arms(
        ["dense", "static", "rigl"], [network.sparsity], list(network.structures)
    )
    paths = {
        arm: [network.records / f"{arm.folder}-seed{seed}.json" for seed in range(network.seeds)]
        for arm in arms
    }
    return {arm: [json.loads(path.read_text()) for path in found] for arm, found in paths.items()}


def _rows(network: Network) -> tuple[list[dict[str, Any]], list[float], score.Score]:
    """Of each arm its summary and its milliseconds of a step."""
    results = _results(network)
    seconds = json.loads((network.records / SECONDS).read_text())
    rows = summary.summary(results)
    judged = score.of(next(iter(results.values()))[0]["test"])
    return rows, [1e3 * seconds[arm.folder] for arm in results], judged


def _table(network: Network) -> str:
    rows, milliseconds, judged = _rows(network)
    what = f"test {judged.label}" + (", %" if judged is score.ACCURACY else "")
    lines = [
        f"{network.title}, {100 * network.sparsity:g} %, {network.seeds} seeds:",
        "",
        f"| structure | method | {what} | minus static | active weights | time of a step |",
        "|---|---|---|---|---|---|",
    ]
    for row, took in zip(rows, milliseconds, strict=True):
        paired = ""
        if difference := row.get("difference"):
            mean, spread = statistics.mean(difference), statistics.stdev(difference)
            paired = f"{judged.number(mean, '+')} ± {judged.number(spread)}"
        kind = row.get("structure") or ("single weights" if row["sparsity"] else "")
        lines.append(
            f"| {kind} | {row['method']} | {judged.number(row['mean'])} ± "
            f"{judged.number(row['std'])} | {paired} | "
            f"{100 * row['active_weights'] / row['weights']:.1f} % | {took / milliseconds[0]:.2f} |"
        )
    return "\n".join(lines) + "\n"


def draw() -> None:
    """Test score against the seconds of training, a panel for each network."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(NETWORKS), figsize=(11, 4.4), layout="constrained")
    for network, axes in zip(NETWORKS, panels, strict=True):
        rows, milliseconds, judged = _rows(network)
        steps = next(iter(_results(network).values()))[0]["config"]["steps"]
        colours = {
            kind: f"C{i}" for i, kind in enumerate(map(sparsity.describe, network.structures))
        }
        for row, took in zip(rows, milliseconds, strict=True):
            kind, method = row.get("structure", ""), row["method"]
            is_dense = row["sparsity"] is None
            axes.errorbar(
                took * steps / 1e3,
                row["mean"],
                yerr=row["std"],
                color="0.3" if is_dense else colours[kind],
                marker={"dense": "s", "static": "o", "rigl": "^"}[method],
                mfc="white" if method == "static" else None,
                capsize=2,
                linestyle="none",
                label="dense" if is_dense else f"{method}, {kind or 'single weights'}",
            )
        axes.set(
            title=f"{network.title}, {100 * network.sparsity:g} %",
            xlabel="seconds of training, 2 CPU cores",
            ylabel=f"test {judged.label}",
        )
        axes.margins(x=0.1)
        axes.set_xlim(left=0)
        axes.title.set_size(9)
        axes.legend(fontsize=7)
    figure.savefig(FIGURE, dpi=150)


if __name__ == "__main__":
    PAGE.write_text(page())
    draw()
