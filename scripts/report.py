"""One HTML page about a run, finished or still training; it opens without network.

python scripts/report.py --workdir=runs/digits [--output=digits.html] [--step=best]

On the CPU, so that a run that is training keeps its accelerator; JAX_PLATFORMS=cuda in the
environment uses one.
"""

import pathlib

from absl import flags, logging

from rigl_optax.reports import page
from rigl_optax.training import command_line

_WORKDIR = flags.DEFINE_string("workdir", None, "Of the run.", required=True)
_STEP = command_line.define_step()
_OUTPUT = flags.DEFINE_string(
    "output", None, "The page; `report.html` in the workdir if not given."
)


def main(argv: list[str]) -> None:
    """Writes the page."""
    del argv
    logging.set_verbosity(logging.WARNING)  # Orbax tells a lot at INFO
    command_line.use_cpu()
    workdir = pathlib.Path(_WORKDIR.value)
    output = pathlib.Path(_OUTPUT.value) if _OUTPUT.value else workdir / "report.html"
    page.write(workdir, output, _STEP.value)
    print(f"wrote {output}")


if __name__ == "__main__":
    command_line.run(main)
