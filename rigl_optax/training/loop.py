"""Trains one run from a config to its result, from wherever it was interrupted."""

import pathlib
from typing import Any

import jax
from rich.console import Console
from rich.text import Text

from rigl_optax.data.prefetch import prefetch
from rigl_optax.training import (
    checkpoints,
    checks,
    costs,
    data_fingerprint,
    display,
    evaluation,
    files,
    fingerprint,
    health,
    hosts,
    loading,
    machine,
    mesh,
    metrics,
    recovery,
    setup,
    signals,
    state,
)
from rigl_optax.training.config import Config
from rigl_optax.training.programs import Programs
from rigl_optax.training.recorder import Launch, Recorder, recording

EXPLANATION_FILE = "explanation.json"
State = state.TrainState


def train(config: Config, workdir: pathlib.Path, console: Console | None = None) -> dict[str, Any]:
    """Trains, or goes on training, and evaluates the test split once at the end.

    A run that was killed at any moment and is started again with the same arguments ends
    with the same parameters and masks, bit for bit, as one that was not. With several
    processes all of them call this with the same arguments and a workdir that all see.

    Args:
      config: The config.
      workdir: Gets `config.json`, `dataset.json`, `explanation.json`, `checkpoints`,
        `metrics.jsonl`, `tensorboard`, `result.json`.
      console: Where process 0 reports; standard output if not given.

    Returns:
      The contents of `result.json`.

    Raises:
      StoppedError: If the process was asked to stop (SIGTERM, Ctrl-C); the steps done are saved.
      NonFiniteError: If a loss or weight is not finite and `config.faults.on_nonfinite` says to
        stop, or going back has not helped.
      RuntimeError: If a file cannot be written, or another process trains in this workdir.
    """
    console = console or display.make_console()
    display.outlive_reader(console)
    if not hosts.is_first():
        console.quiet = True
    # What can be refused cheaply comes first: none of these reads data or computes.
    checkpoints.check_path(workdir)
    hosts.check_devices()  # in front of whatever all processes take part in
    fingerprint.compare_configs(config)
    mesh.placement(config).rows(config.batch_size)  # refuses a batch that cannot be spread
    with checkpoints.explaining_failures(workdir):
        hosts.first_does(lambda: checkpoints.check_claim(workdir, config))
        return _train(setup.prepare(config), workdir, console)


def _train(run: setup.Run, workdir: pathlib.Path, console: Console) -> dict[str, Any]:
    config = run.config
    workdir.mkdir(parents=True, exist_ok=True)
    hosts.check_shared(workdir)
    with hosts.first_enters(lambda: checkpoints.lock(workdir), elsewhere=None):
        hosts.first_does(lambda: checkpoints.check_claim(workdir, config))
        records = hosts.first_tells(lambda: metrics.read(workdir / metrics.FILE))
        ranks = loading.ranks(run, records)
        with (
            checkpoints.open_checkpoints(workdir, config.checkpoint.keep, ranks) as saved,
            signals.asked_to_stop() as stop,
        ):
            # In a list, out of which the steps take it and donate it: one state is on the devices.
            waiting = [loading.first(run, saved, console.print)]
            launch = Launch(
                run,
                state.outline(waiting[0]),
                workdir,
                saved,
                data_fingerprint.of(run.dataset),
                ranks,
                evaluation.evaluator(run),
                fingerprint.comparer(run),
                console,
            )
            is_again = hosts.first_tells(lambda: bool(saved.checkpoints))
            if is_again:
                waiting.clear()
                waiting.append(_newest(launch))
            # Only now: the workdir belongs to no launch that is refused.
            hosts.first_does(lambda: _claim(run, workdir))
            if config.start.path and not is_again:
                launch.compare(waiting[0])
                checkpoints.save(saved, waiting[0], config, data=launch.data)
                saved.wait()  # the recorder asks for what is saved at the step where it begins
            _explain(launch)
            while True:
                start = int(waiting[0].step)
                if is_again:
                    console.print(f"resumed at step {start} of {config.steps}")
                with recording(launch, start, records) as recorder:
                    failed_at = None
                    try:
                        end = _take_steps(launch, recorder, waiting, stop)
                    except recovery.NonFiniteError as error:
                        recovery.check_goes_back(error, config, launch.read_records())
                        console.print(f"warning: {error}; back to the last checkpoint")
                        failed_at = error.step
                    # Not in the handler: the error would keep the state that is not finite.
                    if failed_at is None:
                        measured = recorder.finish(end)
                        break
                    waiting.append(_go_back(launch, recorder, failed_at))
                records, is_again = launch.read_records(), True
        result = _result(launch, recorder, end, measured)
        hosts.first_does(lambda: files.write(workdir / checkpoints.RESULT_FILE, result))
    flops = result["flops"]
    console.print(
        f"test {run.task.score.text(measured['test'])}, "
        f"{sum(result['active_weights'].values()):,} of {result['weights']:,} weights, "
        f"inference FLOPs {flops['inference'] / flops['inference_dense']:.4f}, "
        f"training FLOPs {flops['training'] / flops['training_dense']:.4f} of dense"
    )
    return result


def _take_steps(
    launch: Launch, recorder: Recorder, waiting: list[State], stop: signals.Stop
) -> State:
    """Takes the state out of `waiting` and all steps that are left; returns the last state."""
    run, config = launch.run, launch.run.config
    current, clock = waiting.pop(), recorder.clock
    start, rows = int(current.step), run.placement.rows(config.batch_size)
    launch.compare(current)  # all hosts have found the same checkpoint
    programs = Programs(run, current, skip_until=recorder.went_back_from)

    def make_batch(at: int) -> Any:
        return run.placement.put(run.task.training_batch(config, at, rows))

    with prefetch(make_batch, start, config.steps) as batches, recorder.progress():
        for done, batch in zip(range(start + 1, config.steps + 1), batches, strict=True):
            before = health.masks_before(run, current) if recorder.observes(done) else None
            step = programs.choose(done)
            clock.before(step, current)
            # The history stays outside: an ordinary step would pay for passing it through.
            current = step(current._replace(history=None), batch)._replace(history=current.history)
            programs.note(done, current)
            if before is not None:
                current = recorder.rewiring(done, before, current)
            clock.after(current)
            is_last = done == config.steps
            is_logged = is_last or done % config.log.every == 0
            is_evaluated = is_last or done % config.eval.every == 0
            if is_logged:
                recorder.training(done, current)
            if is_evaluated:
                recorder.validation(done, current)
            if is_logged or is_evaluated:
                recorder.show(done)
            status = stop(done)
            every = config.checkpoint.every
            if is_last or status or (every and done % every == 0):
                recorder.checkpoint(done, current)
            if status and not is_last:
                raise signals.StoppedError(
                    f"asked to stop: saved at step {done} of {config.steps}", status
                )
    return current


def _newest(launch: Launch, until: int | None = None) -> State:
    """Reads the newest state that can be read, up to a step if one is given, or draws the first."""
    run, data = launch.run, launch.data
    found = checkpoints.restore_newest(
        launch.saved, run.abstract, launch.console.print, run.config, until=until, data=data
    )
    return run.draw() if found is None else found


def _go_back(launch: Launch, recorder: Recorder, failed_at: int) -> State:
    """Reads the newest state from before a step that can be read, and records the going back."""
    launch.saved.wait()
    back = _newest(launch, until=failed_at)
    # On disk before anything is done again: a run killed from here on takes the same steps.
    times = metrics.times_gone_back(launch.read_records(), failed_at) + 1
    note = {"from": float(failed_at), "times": float(times)}
    hosts.first_does(lambda: recorder.write(metrics.ROLLBACK, int(back.step), note))
    return back


def _claim(run: setup.Run, workdir: pathlib.Path) -> None:
    checkpoints.claim(workdir, run.config)
    loading.write_facts(workdir, run.task.facts)


def _explain(launch: Launch) -> None:
    """Prints what will be sparse and what it costs, before the first step; keeps it as JSON."""
    run, console = launch.run, launch.console
    config = run.config
    console.print(
        f"{config.method.name}, {config.model.name} on {config.data.name}: {config.steps:,} steps"
    )
    explained = costs.explain(run)
    if explained is None:
        console.print(
            f"{sum(checks.active_weights(run, launch.initial).values()):,} active of "
            f"{sum(run.representation.sizes(launch.initial).values()):,} weights at the start"
        )
        return
    text = explained.to_text(rich=console.is_terminal)
    console.print(Text.from_ansi(text), soft_wrap=True)
    for line in run.representation.storage(launch.initial):
        console.print(line)
    path = launch.workdir / EXPLANATION_FILE
    hosts.first_does(lambda: files.write(path, explained.to_dict()))


def _result(
    launch: Launch, recorder: Recorder, end: State, measured: dict[str, dict[str, float]]
) -> dict[str, Any]:
    """Returns the contents of `result.json`."""
    run = launch.run
    return {
        "config": checkpoints.read_config(launch.workdir),
        **measured,
        "active_weights": checks.active_weights(run, end),
        "weights": sum(run.representation.sizes(end).values()),
        "flops": recorder.flops.total()._asdict(),
        "coverage": health.coverage(run, end),
        "effective_units": health.effective_units(run, end),
        "curve": metrics.curve(launch.read_records()),
        "steps_per_second": recorder.steps_per_second,
        "warnings": list(recorder.warnings.values()),
        "fingerprints": launch.compare(end),
        "machine": machine.describe(),
        "devices": [device.device_kind for device in jax.devices()],
    }
