"""Runs `rigl-optax`: python -m rigl_optax_cli."""

import rigl_optax_cli

rigl_optax_cli.start()
