"""Writes one HTML page about a run, finished or still training; it opens without network.

    rigl-optax report --workdir=runs/digits
    rigl-optax report --workdir=runs/digits --output=digits.html --step=best

On the CPU, so that a run that is training keeps its accelerator; JAX_PLATFORMS=cuda in the
environment uses one.
"""

import pathlib
from collections.abc import Sequence

from absl import flags

from rigl_optax.reports import page
from rigl_optax_cli import command_line


def main(argv: Sequence[str]) -> int:
    """Runs `rigl-optax report`; returns the exit status."""
    return command_line.run(_report, argv, __doc__, _define)


def _define(values: flags.FlagValues) -> None:
    command_line.define_workdir(values)
    command_line.define_step(values)
    about = "The page; `report.html` in the workdir if not given."
    flags.DEFINE_string("output", None, about, values)


def _report(values: flags.FlagValues) -> None:
    command_line.use_cpu()
    workdir = pathlib.Path(values.workdir)
    output = pathlib.Path(values.output) if values.output else workdir / "report.html"
    page.write(workdir, output, values.step)
    print(f"wrote {output}")
