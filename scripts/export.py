"""Runs `rigl-optax export` with the same flags: python scripts/export.py --help."""

import rigl_optax_cli

rigl_optax_cli.start("export")
