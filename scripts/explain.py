"""Runs `rigl-optax explain` with the same flags: python scripts/explain.py --help."""

import rigl_optax_cli

rigl_optax_cli.start("explain")
