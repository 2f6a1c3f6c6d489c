"""Runs `rigl-optax evaluate` with the same flags: python scripts/evaluate.py --help."""

import rigl_optax_cli

rigl_optax_cli.start("evaluate")
