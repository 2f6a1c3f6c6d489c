"""Trains one run from a config, or goes on with it where it was interrupted.

python scripts/train.py --config=configs/digits_lenet.py --workdir=runs/digits \
    --config.method.sparsity=.98 --config.method.name=static

On several hosts the same command on each; TPU pods and SLURM are recognised. Elsewhere, on host i
of 4, with a workdir that all of them see:

python scripts/train.py --config=... --workdir=... \
    --coordinator=host0:8476 --num_processes=4 --process_id=i
"""

if __name__ == "__main__":
    import huge_pages

    huge_pages.use()

import pathlib
import sys

from absl import flags, logging

from rigl_optax.training import command_line, hosts, loop, signals

command_line.define_config()
_WORKDIR = flags.DEFINE_string("workdir", None, "Where the run's files go.", required=True)
_COORDINATOR = flags.DEFINE_string("coordinator", None, "host:port of process 0.")
_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many; 1 alone: look for no others.")
_PROCESS = flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.")


def main(argv: list[str]) -> None:
    """Runs the config of the flags."""
    del argv
    logging.set_verbosity(logging.WARNING)  # Orbax tells a lot at INFO
    config = command_line.checked()
    hosts.join(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value)
    with hosts.failing_together():
        try:
            loop.train(config, pathlib.Path(_WORKDIR.value))
        except signals.StoppedError as stopped:
            if hosts.is_first():
                print(stopped)
            sys.exit(stopped.status)


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    command_line.run(main)
