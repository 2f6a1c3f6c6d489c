"""One run from a config to its result, from wherever it was interrupted."""

import pathlib
import time
from typing import Any

import jax
from rich.console import Console
from rich.text import Text

from rigl_optax.data import batches
from rigl_optax.training import (
    checkpoints,
    checks,
    costs,
    display,
    evaluation,
    health,
    methods,
    metrics,
    setup,
    state,
    step,
)
from rigl_optax.training.config import Config

RESULT_FILE = "result.json"
EXPLANATION_FILE = "explanation.json"
State = state.TrainState


def train(config: Config, workdir: pathlib.Path, console: Console | None = None) -> dict[str, Any]:
    """Trains, or goes on training, and evaluates the test split once at the end.

    A run that was killed at any moment and is started again with the same arguments ends
    with the same parameters and masks, bit for bit, as one that was not.

    Args:
      config: What to do.
      workdir: Gets `config.json`, `explanation.json`, `checkpoints`, `metrics.jsonl`,
        `tensorboard`, `result.json`.
      console: Where to report; standard output if not given.

    Returns:
      What is in `result.json`.
    """
    console = console or display.make_console()
    run = setup.prepare(config)
    flops, spent = costs.count(config, run)
    workdir.mkdir(parents=True, exist_ok=True)
    with checkpoints.lock(workdir):
        checkpoints.claim(workdir, config)
        _explain(config, run, workdir, console)
        with checkpoints.open_checkpoints(workdir, config.keep_checkpoints) as saved:
            restored = checkpoints.restore_newest(saved, run.initial, console.print)
            if restored is not None:
                console.print(f"resumed at step {int(restored.step)} of {config.steps}")
            start = run.initial if restored is None else restored
            with metrics.writer(workdir, resumed_at=int(start.step), spent=spent) as write:
                evaluate = evaluation.evaluator(config, run)
                end, steps_per_second, warnings = _run_steps(
                    config, run, start, evaluate, saved, write, console
                )
                measured = {
                    "validation": evaluate(end, run.dataset.validation),
                    "test": evaluate(end, run.dataset.test),
                }
                write("test", config.steps, measured["test"])
        result: dict[str, Any] = {
            "config": checkpoints.read_config(workdir),
            **measured,
            "active_weights": checks.active_weights(config, end),
            "weights": sum(leaf.size for leaf in jax.tree.leaves(end.params)),
            "flops": flops._asdict(),
            "steps_per_second": steps_per_second,
            "warnings": warnings,
            "devices": [device.device_kind for device in jax.devices()],
        }
        checkpoints.write_json(workdir / RESULT_FILE, result)
    console.print(
        f"test accuracy {100 * measured['test']['accuracy']:.2f} %, "
        f"{sum(result['active_weights'].values()):,} of {result['weights']:,} weights, "
        f"inference FLOPs {flops.inference / flops.inference_dense:.4f}, "
        f"training FLOPs {flops.training / flops.training_dense:.4f} of dense"
    )
    return result


def _explain(config: Config, run: setup.Run, workdir: pathlib.Path, console: Console) -> None:
    """Says what will be sparse and what it costs, before the first step; keeps it as JSON."""
    console.print(f"{config.method}, {config.model} on {config.dataset}: {config.steps:,} steps")
    explained = costs.explain(config, run)
    if explained is None:
        sizes = [leaf.size for leaf in jax.tree.leaves(run.initial.params)]
        console.print(
            f"{sum(checks.active_weights(config, run.initial).values()):,} active of "
            f"{sum(sizes):,} weights; what they cost is not known for this method"
        )
        return
    text = explained.to_text(rich=console.is_terminal)
    console.print(Text.from_ansi(text), soft_wrap=True)
    checkpoints.write_json(workdir / EXPLANATION_FILE, explained.to_dict())


def _run_steps(
    config: Config,
    run: setup.Run,
    current: State,
    evaluate: evaluation.Evaluate,
    saved: checkpoints.Checkpoints,
    write: metrics.Write,
    console: Console,
) -> tuple[State, float, list[str]]:
    """Steps until the last, checkpoints on the way; the last state, steps per second, warnings.

    `current` is copied first: its buffers are donated, and the caller's stay valid.
    """
    train_step = step.make_train_step(
        run.graphdef,
        run.tx,
        run.to_float,
        methods.growth_predicate(config),
        config.log_every,
    )
    expected = checks.active_weights(config, run.initial)
    observe = health.observer(run.initial, expected) if methods.find(config).rewires else None
    warned: dict[str, str] = {}
    start = int(current.step)
    began = time.monotonic()
    current = jax.tree.map(lambda x: x.copy(), current)
    shown: dict[str, str] = {}
    with display.training_progress(console, start, config.steps) as show:
        for done in range(start + 1, config.steps + 1):
            batch = batches.training_batch(
                run.dataset.train, config.batch_size, seed=config.seed, step=done - 1
            )
            rewires = observe is not None and methods.is_rewiring(config, done - 1)
            before = health.masks_before(current) if rewires else None
            # The history stays outside: an ordinary step would pay for passing it through.
            current = train_step(current._replace(history=None), batch)._replace(
                history=current.history
            )
            if observe is not None and before is not None:
                current, values = observe(before, current)
                write("rewiring", done, values)
            if done == start + 1:
                jax.block_until_ready(current)  # compiled by now: the clock starts here
                began = time.monotonic()
            is_last = done == config.steps
            if is_last or done % config.log_every == 0:
                values, warnings = checks.training_record(config, current, expected)
                write("train", done, values)
                for kind in warnings.keys() - warned.keys():
                    console.print(f"warning: {warnings[kind]}")
                warned = warnings | warned  # each kind is told once
                shown["loss"] = f"{values['loss']:.4f}"
                shown["acc"] = f"{100 * values['accuracy']:.2f} %"
            if is_last or done % config.eval_every == 0:
                validation = evaluate(current, run.dataset.validation)
                write("validation", done, validation)
                shown["val"] = f"{100 * validation['accuracy']:.2f} %"
            if is_last or done % config.log_every == 0 or done % config.eval_every == 0:
                show(done, "  ".join(f"{name} {value}" for name, value in shown.items()))
            if is_last or (config.checkpoint_every and done % config.checkpoint_every == 0):
                checkpoints.save(saved, current)
    seconds = time.monotonic() - began
    return current, max(config.steps - start - 1, 0) / seconds, list(warned.values())
