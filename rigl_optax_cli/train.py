r"""Trains one run from a recipe, or goes on with it where it was interrupted.

    rigl-optax train digits_lenet --workdir=runs/digits \
        --config.method.sparsity=.98 --config.method.name=static

The same command goes on with a run that was interrupted. On several hosts it is the same on each;
TPU pods and SLURM are recognised. Elsewhere, on host i of 4, with a workdir that all of them see:

    rigl-optax train digits_lenet --workdir=/mnt/runs/digits \
        --coordinator=host0:8476 --num_processes=4 --process_id=i
"""

import pathlib
from collections.abc import Sequence

from absl import flags

from rigl_optax.training import hosts, loop, signals
from rigl_optax_cli import command_line


def main(argv: Sequence[str]) -> int:
    """Runs `rigl-optax train`; returns the exit status."""
    return command_line.run(_train, argv, __doc__, _define, with_recipe=True)


def _define(values: flags.FlagValues) -> None:
    text, number = flags.DEFINE_string, flags.DEFINE_integer
    text("workdir", None, "Where the run's files go.", values, required=True)
    text("coordinator", None, "host:port of process 0.", values)
    number("num_processes", None, "How many; 1 alone: look for no others.", flag_values=values)
    number("process_id", None, "Which of them this is, from 0.", flag_values=values)


def _train(values: flags.FlagValues) -> int:
    config = command_line.checked(values)
    hosts.join(values.coordinator, values.num_processes, values.process_id)
    with hosts.failing_together():
        try:
            loop.train(config, pathlib.Path(values.workdir))
        except signals.StoppedError as stopped:
            if hosts.is_first():
                print(stopped)
            return stopped.status
    return 0
