"""Defines what `explain` returns: an object with fields, a dict for JSON, a table to read."""

import importlib.util
import io
import math
import sys
from typing import Any, NamedTuple

from rigl_optax.accounting.storage import StorageBytes


class LayerReport(NamedTuple):
    """One parameter leaf.

    Attributes:
      path: Path of the leaf.
      shape: Shape of the leaf.
      is_sparse: Whether it has a mask (even at sparsity 0).
      sparsity: Fraction of inactive weights at the start, after rounding to whole weights.
      active: Number of active weights at the start.
      active_at_end: Number of active weights when training ends; differs if the method prunes.
      flops: FLOPs of the dense forward pass that use the leaf; None without a model.
      flops_share: Fraction that these are of all FLOPs of the pass; None without a model.
      dense_because: Why no weight of the leaf is inactive; None if some are.
    """

    path: str
    shape: tuple[int, ...]
    is_sparse: bool
    sparsity: float
    active: int
    active_at_end: int
    flops: int | None
    flops_share: float | None
    dense_because: str | None

    @property
    def size(self) -> int:
        """Number of weights, active or not."""
        return math.prod(self.shape)


class Explanation(NamedTuple):
    """The layers, rewirings and costs of a sparse run; made by `explain`.

    FLOPs are multiplies plus adds per example.

    Attributes:
      method: Name of the method.
      layers: Every leaf of params, in tree order.
      average_parameters: Number of active parameters, dense leaves included, as a mean over the
        steps of training: what scaling laws of sparse and dense networks share.
      rewirings: Number of rewirings in `steps` steps.
      replaced: Upper bound of the weights that all rewirings together replace (a weight that is
        dropped and grown again at once counts); None if the weights decide how many.
      steps: Number of training steps.
      flops_dense: FLOPs of a dense forward pass; None without a model.
      flops_sparse: FLOPs of a sparse forward pass when training ends; None without a model.
      training_ratio: FLOPs of training relative to dense training; None without a model.
      storage: Bytes of the weights in several formats when training ends.
      notes: Assumptions of the count, and FLOPs that belong to no single parameter.
      warnings: Likely mistakes, a sentence each.
    """

    method: str
    layers: tuple[LayerReport, ...]
    average_parameters: float
    rewirings: int
    replaced: int | None
    steps: int
    flops_dense: float | None
    flops_sparse: float | None
    training_ratio: float | None
    storage: StorageBytes
    notes: tuple[str, ...]
    warnings: tuple[str, ...]

    @property
    def weights(self) -> int:
        """Number of weights of the sparse leaves, active or not."""
        return sum(x.size for x in self.layers if x.is_sparse)

    @property
    def active(self) -> int:
        """Number of active weights of the sparse leaves, as `init` makes them."""
        return sum(x.active for x in self.layers if x.is_sparse)

    @property
    def active_at_end(self) -> int:
        """Number of active weights of the sparse leaves when training ends."""
        return sum(x.active_at_end for x in self.layers if x.is_sparse)

    @property
    def sparsity(self) -> float:
        """Sparsity of the sparse leaves together, at the start."""
        return 1 - self.active / self.weights if self.weights else 0.0

    @property
    def turnover(self) -> float | None:
        """Upper bound of the replaced weights / active weights, over all rewirings."""
        if self.replaced is None:
            return None
        return self.replaced / self.active if self.active else 0.0

    @property
    def reach(self) -> float | None:
        """Upper bound of the fraction of the sparse leaves' weights that is ever active."""
        if self.replaced is None:
            return None
        return min(1.0, (self.active + self.replaced) / self.weights) if self.weights else 1.0

    @property
    def inference_ratio(self) -> float | None:
        """FLOPs of a sparse forward pass relative to a dense one; None without a model."""
        if self.flops_dense is None or self.flops_sparse is None:
            return None
        return self.flops_sparse / self.flops_dense if self.flops_dense else 1.0

    def to_dict(self) -> dict[str, Any]:
        """Returns all fields and properties in types that JSON has."""
        derived = (
            "weights",
            "active",
            "active_at_end",
            "sparsity",
            "turnover",
            "reach",
            "inference_ratio",
        )
        return {
            **self._asdict(),
            **{name: getattr(self, name) for name in derived},
            "layers": [{**x._asdict(), "shape": list(x.shape)} for x in self.layers],
            "storage": self.storage._asdict(),
            "notes": list(self.notes),
            "warnings": list(self.warnings),
        }

    def to_text(self, *, rich: bool | None = None) -> str:
        """Formats a table of the layers, and the totals.

        Args:
          rich: Whether to draw with the `rich` package; None: if standard output is a terminal
            and the package is installed.
        """
        if rich is None:
            rich = sys.stdout.isatty() and importlib.util.find_spec("rich") is not None
        header, rows = self._table()
        below = "\n".join([*self._totals(), *(f"note: {n}" for n in self.notes)])
        warnings = [f"warning: {w}" for w in self.warnings]
        if not rich:
            return "\n".join([_plain(header, rows), "", below, *warnings])
        return _rich(header, rows, below, warnings)

    def __str__(self) -> str:
        return self.to_text(rich=False)

    def _table(self) -> tuple[list[str], list[list[str]]]:
        prunes = self.active_at_end != self.active
        header = ["layer", "shape", "sparsity", "active", "at end", "of", "FLOPs", "dense because"]
        rows = [
            [
                x.path or "(the array)",
                "x".join(map(str, x.shape)) or "scalar",
                "dense" if x.active == x.active_at_end == x.size else f"{x.sparsity:.4f}",
                f"{x.active:,}",
                f"{x.active_at_end:,}",
                f"{x.size:,}",
                "" if x.flops_share is None else f"{x.flops_share:.1%}",
                x.dense_because or "",
            ]
            for x in self.layers
        ]
        hidden = [*([] if prunes else [4]), *([6] if self.flops_dense is None else [])]
        header, *rows = [
            [cell for i, cell in enumerate(row) if i not in hidden] for row in [header, *rows]
        ]
        return header, rows

    def _end(self) -> str:
        if self.active_at_end == self.active:
            return ""
        sparsity = 1 - self.active_at_end / self.weights
        return f"; when training ends {self.active_at_end:,}, sparsity {sparsity:.4f}"

    def _totals(self) -> list[str]:
        lines = [
            f"sparse layers: {self.active:,} of {self.weights:,} weights active, "
            f"sparsity {self.sparsity:.4f}" + self._end(),
            f"bytes: {self.storage.dense:,} dense, {self.storage.values_and_bitmask:,} as values "
            f"and bit masks, {self.storage.csr:,} as CSR",
        ]
        if self.average_parameters != sum(x.active for x in self.layers):
            lines.append(
                f"parameters: {self.average_parameters:,.0f} active on average over training"
            )
        if self.rewirings and self.replaced is None:
            lines.append(f"{self.rewirings:,} rewirings, by the weights' own sizes")
        elif self.rewirings and self.replaced:
            lines.append(
                f"{self.rewirings:,} rewirings replace {self.replaced:,} weights in all, "
                f"{self.turnover:.2f} times the active ones; at most {self.reach:.1%} of all "
                "weights are ever active"
            )
        elif self.rewirings:
            lines.append(f"{self.rewirings:,} rewirings")
        if self.inference_ratio is not None:
            lines.append(
                f"forward pass: {self.flops_sparse:,.0f} of {self.flops_dense:,.0f} FLOPs, "
                f"{self.inference_ratio:.4f} of dense"
            )
        if self.training_ratio is not None:
            lines.append(
                f"training ({self.method}, {self.steps:,} steps): {self.training_ratio:.4f} "
                "of dense"
            )
        return lines


def _plain(header: list[str], rows: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    is_text = [name in ("layer", "shape", "dense because") for name in header]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if text else cell.rjust(width)
            for cell, width, text in zip(row, widths, is_text, strict=True)
        ).rstrip()
        for row in [header, *rows]
    )


def _rich(header: list[str], rows: list[list[str]], below: str, warnings: list[str]) -> str:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table()
    for name in header:
        text, wraps = name in ("layer", "shape", "dense because"), name == "dense because"
        table.add_column(name, justify="left" if text else "right", no_wrap=not wraps)
    for row in rows:
        table.add_row(*map(Text, row), style="dim" if row[2] == "dense" else None)
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True)
    console.print(table)
    console.print(Text(below))
    for warning in warnings:
        console.print(Text(warning, style="bold yellow"))
    return stream.getvalue().rstrip("\n")
