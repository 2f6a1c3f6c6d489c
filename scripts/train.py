"""Trains one run from a config, or goes on with it where it was interrupted.

python scripts/train.py --config=configs/digits_lenet.py --workdir=runs/digits \
    --config.sparsity=.98 --config.method=static
"""

import pathlib

from absl import app, flags, logging
from ml_collections import config_flags

from rigl_optax.training import command_line, loop

_CONFIG = config_flags.DEFINE_config_file("config", None, "The recipe.", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Where the run's files go.", required=True)


def main(argv: list[str]) -> None:
    """Runs the config of the flags."""
    del argv
    logging.set_verbosity(logging.WARNING)  # Orbax tells a lot at INFO
    loop.train(command_line.checked(_CONFIG.value), pathlib.Path(_WORKDIR.value))


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    app.run(main, flags_parser=command_line.parse)
