"""Runs `rigl-optax compare` with the same flags: python scripts/compare.py --help."""

import rigl_optax_cli

rigl_optax_cli.start("compare")
