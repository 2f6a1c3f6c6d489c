"""Runs `rigl-optax prepare` with the same flags: python scripts/prepare.py --help."""

import rigl_optax_cli

rigl_optax_cli.start("prepare")
