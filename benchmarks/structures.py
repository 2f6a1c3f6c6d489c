"""Times a training step of each structure, to compare with the accuracy of its runs.

    python benchmarks/structures.py results/fashion_mnist_mlp
    python benchmarks/structures.py results/tdavid_gru --match='dense|(static|rigl)-0.9'

Reads the configs of finished runs from their records, and takes the steps of `rigl-optax train`:
dense, masked, or condensed. All forms take a few steps in turn, in alternating order, on batches
that are in memory. Rewirings are timed separately and added in proportion. Medians are written to
`seconds.json` beside the records, by the names of the runs without their seed.
"""

import argparse
import functools
import pathlib
import re
import statistics
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rigl_optax.training import config as config_lib
from rigl_optax.training import files, setup, step

FILE = "seconds.json"
STEPS = 4  # steps that a form takes at a time
PyTree = Any


class Form(NamedTuple):
    """The compiled steps of a run, its first state, and the fraction of its steps that rewire."""

    ordinary: step.TrainStep
    rewiring: step.TrainStep
    initial: PyTree
    batches: list[PyTree]
    share: float


def form(config: config_lib.Config) -> Form:
    """Compiles the steps of a run."""
    run = setup.prepare(config)
    make = functools.partial(step.make_train_step, run)
    rows = run.placement.rows(config.batch_size)
    batches = [run.placement.put(run.task.training_batch(config, at, rows)) for at in range(STEPS)]
    ordinary = make()
    return Form(
        ordinary,
        make(rewires=True) if config.method.condensed and run.rewirings.happen else ordinary,
        run.initial._replace(history=None),
        batches,
        run.rewirings.before(config.steps) / config.steps,
    )


def seconds(forms: dict[str, Form], rounds: int) -> dict[str, float]:
    """Returns the median seconds of a step of each form, rewirings included in proportion."""
    # Every schedule here begins with a rewiring; ordinary steps follow.
    states = {}
    for name, each in forms.items():
        first = jax.tree.map(jnp.copy, each.initial)
        states[name] = each.rewiring(first, each.batches[0])
    ordinary: dict[str, list[float]] = {name: [] for name in forms}
    rewiring: dict[str, list[float]] = {name: [] for name in forms}
    for number in range(rounds + 1):
        for name in sorted(forms, reverse=number % 2 == 1):
            each, state = forms[name], jax.block_until_ready(states[name])
            start = time.perf_counter()
            for batch in each.batches:
                state = each.ordinary(state, batch)
            states[name] = jax.block_until_ready(state)
            took = (time.perf_counter() - start) / STEPS
            first = jax.block_until_ready(jax.tree.map(jnp.copy, each.initial))
            start = time.perf_counter()
            jax.block_until_ready(each.rewiring(first, each.batches[0]))
            if number:  # the first round compiles
                ordinary[name].append(took)
                rewiring[name].append(time.perf_counter() - start)
    return {
        name: (1 - each.share) * statistics.median(ordinary[name])
        + each.share * statistics.median(rewiring[name])
        for name, each in forms.items()
    }


def main() -> None:
    """Times all forms; prints and writes the seconds of a step."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("records", type=pathlib.Path)
    parser.add_argument("--match", default="", help="only runs whose names this begins")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    forms = {}
    for path in sorted(options.records.glob("*-seed0.json")):
        if re.match(options.match, path.name):
            record = files.read(path, "the record of a run", files.RESULT)
            config = config_lib.from_mapping(record["config"])
            forms[path.name.removesuffix("-seed0.json")] = form(config)
    found = seconds(forms, options.rounds)
    dense = found.get("dense")
    for name, took in found.items():
        print(f"{name:40}{1e3 * took:9.2f} ms" + (f"{dense / took:8.2f}" if dense else ""))
    files.write(options.records / FILE, found)


if __name__ == "__main__":
    main()
