"""Runs `rigl-optax train` with the same flags: python scripts/train.py --help."""

import rigl_optax_cli

rigl_optax_cli.start("train")
