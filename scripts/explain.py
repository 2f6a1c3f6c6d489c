"""Tells what a config will train, and what that costs, before any training.

python scripts/explain.py --config=configs/digits_lenet.py --config.sparsity=.98 [--json]
"""

import json
from typing import Any

import jax
import jax.numpy as jnp
from absl import app, flags, logging
from flax import nnx
from ml_collections import config_flags

from rigl_optax import accounting
from rigl_optax.training import command_line, config, methods, setup

_CONFIG = config_flags.DEFINE_config_file("config", None, "The recipe.", lock_config=True)
_JSON = flags.DEFINE_bool("json", False, "For programs: one JSON object instead of a table.")


def explain(recipe: config.Config) -> accounting.Explanation:
    """What the run of a config will be."""
    run = setup.prepare(recipe)

    def forward(params: Any, images: jax.Array) -> jax.Array:
        model = nnx.merge(run.graphdef, params, run.initial.model_state)
        model.eval()
        return model(images)

    return accounting.explain(
        run.initial.params,
        methods.distribution(recipe),
        end=recipe.rewire_end,
        every=recipe.rewire_every,
        drop_fraction=recipe.drop_fraction,
        method=recipe.method,
        steps=recipe.steps,
        model=forward,
        inputs=[jax.ShapeDtypeStruct((1, *run.image_shape), jnp.float32)],
    )


def main(argv: list[str]) -> None:
    """Explains the config of the flags."""
    del argv
    logging.set_verbosity(logging.WARNING)
    report = explain(command_line.checked(_CONFIG.value))
    print(json.dumps(report.to_dict(), indent=2) if _JSON.value else report.to_text())


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    app.run(main, flags_parser=command_line.parse)
