"""Runs `rigl-optax reproduce` with the same flags: python scripts/reproduce.py --help."""

import rigl_optax_cli

rigl_optax_cli.start("reproduce")
