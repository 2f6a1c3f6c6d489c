"""Tells what a config will train, and what that costs, before any training.

python scripts/explain.py --config=configs/digits_lenet.py --config.method.sparsity=.98 [--json]
"""

import json

from absl import flags, logging
from ml_collections import config_flags

from rigl_optax.training import command_line, costs, mesh, setup

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "The recipe.", lock_config=False, accept_new_attributes=True
)
_JSON = flags.DEFINE_bool("json", False, "For programs: one JSON object instead of a table.")


def main(argv: list[str]) -> None:
    """Explains the config of the flags."""
    del argv
    logging.set_verbosity(logging.WARNING)
    command_line.use_cpu()
    recipe = mesh.fitting(command_line.checked(_CONFIG.value))
    report = costs.explain(recipe, setup.prepare(recipe))
    if report is None:
        command_line.refuse(f"method {recipe.method.name!r} cannot be explained")
    print(json.dumps(report.to_dict(), indent=2) if _JSON.value else report.to_text())


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    command_line.run(main)
