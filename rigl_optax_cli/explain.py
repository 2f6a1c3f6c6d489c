"""Tells what a recipe will train, and what that costs, before any training.

rigl-optax explain digits_lenet --config.method.sparsity=.98
rigl-optax explain imagenet_resnet50 --json
"""

import json
from collections.abc import Sequence

from absl import flags

from rigl_optax.training import costs, mesh, setup
from rigl_optax_cli import command_line


def main(argv: Sequence[str]) -> int:
    """Runs `rigl-optax explain`; returns the exit status."""
    return command_line.run(_explain, argv, __doc__, _define, with_recipe=True)


def _define(values: flags.FlagValues) -> None:
    flags.DEFINE_bool("json", False, "Print one JSON object instead of a table.", values)


def _explain(values: flags.FlagValues) -> None:
    command_line.use_cpu()
    config = mesh.fitting(command_line.checked(values))
    report = costs.explain(setup.prepare(config))
    if report is None:
        raise ValueError(f"method {config.method.name!r} cannot be explained")
    print(json.dumps(report.to_dict(), indent=2) if values.json else report.to_text())
