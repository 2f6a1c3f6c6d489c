"""Flags of the scripts: one clear line for a key that does not exist."""

import os
import sys

import jax
from absl import flags
from ml_collections import config_dict

from rigl_optax.training import config as config_lib


def define_step() -> flags.FlagHolder[str]:
    """The flag `--step` of the scripts that look at a checkpoint, for `evaluation.restore`."""
    return flags.DEFINE_string(
        "step", "newest", "Which checkpoint: newest, best (on the validation split), or its step."
    )


def use_cpu() -> None:
    """Leaves accelerators to what trains, for scripts that look at runs; call it before computing.

    `JAX_PLATFORMS=cuda` (or `tpu`) in the environment decides otherwise.
    """
    if not os.environ.get("JAX_PLATFORMS"):
        jax.config.update("jax_platforms", "cpu")


def parse(argv: list[str]) -> list[str]:
    """For `absl.app.run(main, flags_parser=parse)`: `absl`'s parser, errors made readable.

    `ml_collections` refuses an unknown `--config.key` with a traceback; this one exits with
    status 1 and the list of known keys.
    """
    try:
        return list(flags.FLAGS(argv))
    except (AttributeError, KeyError) as error:
        known = ", ".join(config_lib.known_keys())
        sys.exit(f"unknown config key: {' '.join(str(error).split())}\nknown keys are {known}")
    except flags.Error as error:
        sys.exit(f"{error}\nPass --help for the flags.")


def checked(values: config_dict.ConfigDict) -> config_lib.Config:
    """The config of the flags; exits with status 1 and what is wrong with it, if anything is."""
    try:
        return config_lib.from_mapping(values.to_dict())
    except ValueError as error:
        sys.exit(str(error))
