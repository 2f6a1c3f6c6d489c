"""Runs `rigl-optax sample` with the same flags: python scripts/sample.py --help."""

import rigl_optax_cli

rigl_optax_cli.start("sample")
