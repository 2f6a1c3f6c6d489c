"""Runs `rigl-optax report` with the same flags: python scripts/report.py --help."""

import rigl_optax_cli

rigl_optax_cli.start("report")
