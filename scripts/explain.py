"""Tells what a config will train, and what that costs, before any training.

python scripts/explain.py --config=configs/digits_lenet.py --config.method.sparsity=.98 [--json]
"""

import json

from absl import flags, logging

from rigl_optax.training import command_line, costs, mesh, setup

command_line.define_config()
_JSON = flags.DEFINE_bool("json", False, "For programs: one JSON object instead of a table.")


def main(argv: list[str]) -> None:
    """Explains the config of the flags."""
    del argv
    logging.set_verbosity(logging.WARNING)
    command_line.use_cpu()
    recipe = mesh.fitting(command_line.checked())
    report = costs.explain(setup.prepare(recipe))
    if report is None:
        command_line.refuse(f"method {recipe.method.name!r} cannot be explained")
    print(json.dumps(report.to_dict(), indent=2) if _JSON.value else report.to_text())


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    command_line.run(main)
