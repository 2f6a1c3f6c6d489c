"""One run from a config to its result, from wherever it was interrupted."""

import functools
import math
import pathlib
import time
from typing import Any, NamedTuple

import jax
from rich.console import Console
from rich.text import Text

from rigl_optax.data.ahead import ahead
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
    methods,
    metrics,
    recovery,
    setup,
    signals,
    sparsity,
    state,
    step,
)
from rigl_optax.training.config import Config

EXPLANATION_FILE = "explanation.json"
State = state.TrainState


def train(config: Config, workdir: pathlib.Path, console: Console | None = None) -> dict[str, Any]:
    """Trains, or goes on training, and evaluates the test split once at the end.

    A run that was killed at any moment and is started again with the same arguments ends
    with the same parameters and masks, bit for bit, as one that was not. With several
    processes all of them call this with the same arguments and a workdir that all see.

    Args:
      config: What to do.
      workdir: Gets `config.json`, `explanation.json`, `checkpoints`, `metrics.jsonl`,
        `tensorboard`, `result.json`.
      console: Where process 0 reports; standard output if not given.

    Returns:
      What is in `result.json`.

    Raises:
      StoppedError: If the process was asked to stop (SIGTERM, Ctrl-C); what was done is saved.
      NonFiniteError: If a loss or weight is not finite and `config.faults.on_nonfinite` says to
        stop, or going back has not helped.
      RuntimeError: If a file cannot be written, or another process trains in this workdir.
    """
    console = console or display.make_console()
    display.outlive_reader(console)
    if not hosts.is_first():
        console.quiet = True
    checkpoints.check_path(workdir)
    hosts.check_devices()  # in front of whatever all processes take part in
    fingerprint.compare_configs(config)
    with checkpoints.told_of_failures(workdir):
        return _train(config, workdir, console)


def _train(config: Config, workdir: pathlib.Path, console: Console) -> dict[str, Any]:
    run = setup.prepare(config)
    run.placement.rows(config.batch_size)  # refuses what cannot be spread
    compare = fingerprint.comparer(config, run.placement)
    workdir.mkdir(parents=True, exist_ok=True)
    hosts.check_shared(workdir)
    # One state at a time is on the devices: whoever trains takes it out of here and donates it.
    held = [run.initial]
    run = run._replace(initial=state.outline(run.initial))

    def read() -> metrics.Records:
        return hosts.first_tells(lambda: metrics.read(workdir / metrics.FILE))

    with hosts.first_enters(lambda: checkpoints.lock(workdir), elsewhere=None):
        hosts.first_does(lambda: checkpoints.check_claim(workdir, config))
        evaluate = evaluation.evaluator(config, run)
        judged = run.task.score
        records = read()
        validated = metrics.recorded(records, "validation", judged.key)
        ranks = {done: judged.rank({judged.key: value}) for done, value in validated.items()}
        with (
            checkpoints.open_checkpoints(workdir, config.checkpoint.keep, ranks) as saved,
            signals.asked_to_stop() as stop,
        ):
            data = data_fingerprint.of(run.dataset)
            if is_again := bool(saved.checkpoints):
                held.clear()  # before the other one is read
                held += _newest(config, run, saved, console, data)
            # Only now: a launch that is refused changes nothing.
            hosts.first_does(lambda: checkpoints.claim(workdir, config))
            _explain(config, run, workdir, console)
            while True:
                start = int(held[0].step)
                if is_again:
                    console.print(f"resumed at step {start} of {config.steps}")
                told = metrics.warnings(records)
                records = metrics.until(records, start)
                tally = costs.Tally(config, run, metrics.looks(records, start))
                with hosts.first_enters(
                    functools.partial(
                        metrics.writer,
                        workdir,
                        resumed_at=start,
                        spent=tally.spent,
                        say=console.print,
                    ),
                    elsewhere=metrics.write_nothing,
                ) as write:
                    watch = _Watch(
                        *(evaluate, compare, tally, saved, data, ranks, write, console, stop),
                        *(workdir, told, records),
                    )
                    gone_at = None
                    try:
                        end, steps_per_second, warnings = _run_steps(config, run, held, watch)
                    except recovery.NonFiniteError as error:
                        _check_goes_back(config, error, read(), watch)
                        gone_at = error.step
                    if gone_at is None:
                        measured = {
                            "validation": evaluate(end, run.dataset.validation),
                            "test": evaluate(end, run.dataset.test),
                        }
                        for split, values in measured.items():
                            recovery.check_evaluation(split, values, config.steps)
                        write("test", config.steps, measured["test"])
                        break
                    held += _go_back(config, run, gone_at, read(), watch)
                records, is_again = read(), True
        flops = tally.flops()
        result: dict[str, Any] = {
            "config": checkpoints.read_config(workdir),
            **measured,
            "active_weights": checks.active_weights(config, end),
            "weights": sum(state.sizes(end).values()),
            "flops": flops._asdict(),
            "coverage": health.coverage(end),
            "curve": metrics.curve(read()),
            "steps_per_second": steps_per_second,
            "warnings": list((warnings | _left_out(run)).values()),
            "fingerprints": compare(end),
            "devices": [device.device_kind for device in jax.devices()],
        }
        hosts.first_does(lambda: files.write(workdir / checkpoints.RESULT_FILE, result))
    console.print(
        f"test {run.task.score.text(measured['test'])}, "
        f"{sum(result['active_weights'].values()):,} of {result['weights']:,} weights, "
        f"inference FLOPs {flops.inference / flops.inference_dense:.4f}, "
        f"training FLOPs {flops.training / flops.training_dense:.4f} of dense"
    )
    return result


def _explain(config: Config, run: setup.Run, workdir: pathlib.Path, console: Console) -> None:
    """Says what will be sparse and what it costs, before the first step; keeps it as JSON."""
    console.print(
        f"{config.method.name}, {config.model.name} on {config.data.name}: {config.steps:,} steps"
    )
    explained = costs.explain(config, run)
    if explained is None:
        console.print(
            f"{sum(checks.active_weights(config, run.initial).values()):,} active of "
            f"{sum(state.sizes(run.initial).values()):,} weights at the start"
        )
        return
    text = explained.to_text(rich=console.is_terminal)
    console.print(Text.from_ansi(text), soft_wrap=True)
    for path, stored in state.topologies(run.initial).items():
        block, groups = stored.block, math.prod(stored.grid)
        console.print(
            f"{path}: {stored.number:,} of {groups:,} blocks of {block.rows}x{block.cols} stored"
        )
    hosts.first_does(lambda: files.write(workdir / EXPLANATION_FILE, explained.to_dict()))


def _left_out(run: setup.Run) -> dict[str, str]:
    """A warning if records of the dataset were left out."""
    first = run.task.left_out[:3]
    if not first:
        return {}
    return {
        "left_out": f"{len(run.task.left_out)} records of the dataset could not be read and are "
        f"left out; the first: {'; '.join(first)}"
    }


class _Watch(NamedTuple):
    """What looks at a run from outside, and what it reports to."""

    evaluate: evaluation.Evaluate
    compare: fingerprint.Compare
    tally: costs.Tally
    saved: checkpoints.Checkpoints
    data: dict[str, str]
    ranks: dict[int, float]
    write: metrics.Write
    console: Console
    stop: signals.Stop
    workdir: pathlib.Path
    told: dict[str, str]  # warnings of earlier launches, some of steps that are done again
    records: metrics.Records  # of earlier launches, up to where this one goes on

    def warn(self, step: int, found: dict[str, str], warned: dict[str, str]) -> None:
        """Records what has not been warned of; prints what has not even been told before."""
        for kind in [kind for kind in found if kind not in warned]:
            warned[kind] = found[kind]
            if kind not in self.told:
                self.console.print(f"warning: {found[kind]}", markup=False)
            self.write(metrics.WARNING, step, {metrics.WARNING: kind, "text": found[kind]})


def _newest(
    config: Config,
    run: setup.Run,
    saved: checkpoints.Checkpoints,
    console: Console,
    data: dict[str, str] | None = None,
    until: int | None = None,
) -> list[State]:
    """Reads the newest state that can be read, or makes the first one; alone in a list."""
    found = checkpoints.restore_newest(
        saved, run.initial, console.print, config, until=until, data=data
    )
    return [run.draw() if found is None else found]


def _check_goes_back(
    config: Config, error: recovery.NonFiniteError, records: metrics.Records, watch: _Watch
) -> None:
    """Raises the error if the run is not to go back to a checkpoint.

    What it decides follows from what is on disk, so that a run that was killed in between decides
    alike.
    """
    if config.faults.on_nonfinite != "rollback" or not error.can_skip:
        raise error
    times = metrics.times_gone_back(records, error.step)
    if times >= config.faults.max_rollbacks:
        raise recovery.NonFiniteError(
            f"{error}, after going back {times} times, the last time from step "
            f"{metrics.went_back_from(records, error.step)}; config.faults.max_rollbacks="
            f"{config.faults.max_rollbacks}",
            error.step,
        )
    watch.console.print(f"warning: {error}; back to the last checkpoint")


def _go_back(
    config: Config, run: setup.Run, gone_at: int, records: metrics.Records, watch: _Watch
) -> list[State]:
    """Reads the newest state from before a step that can be read, and notes the going back."""
    watch.saved.wait()
    back = _newest(config, run, watch.saved, watch.console, until=gone_at)
    # On disk before anything is done again: a run killed from here on takes the same steps.
    times, to = metrics.times_gone_back(records, gone_at) + 1, int(back[0].step)
    note = {"from": float(gone_at), "times": float(times)}
    hosts.first_does(lambda: watch.write(metrics.ROLLBACK, to, note))
    return back


def _programs(config: Config, run: setup.Run, *, skips: bool) -> dict[bool, step.TrainStep]:
    """The compiled steps, by whether they rewire; with masks one program does both."""
    make = functools.partial(
        step.make_train_step,
        run,
        methods.growth_predicate(config),
        config.log.every,
        label_smoothing=config.loss.label_smoothing,
        skips=skips,
    )
    ordinary = make()
    return {False: ordinary, True: make(rewires=True) if config.method.condensed else ordinary}


def _run_steps(
    config: Config, run: setup.Run, held: list[State], watch: _Watch
) -> tuple[State, float, dict[str, str]]:
    """Steps until the last, checkpoints on the way; the last state, steps per second, warnings.

    It takes the state out of `held`, for its buffers are donated to the first step. Up to the step
    that the run has gone back from, steps that are not finite are skipped.
    """
    evaluate, compare, tally, saved, data, ranks, write, console, stop, workdir, _, records = watch
    current = held.pop()
    judged = run.task.score
    careful_until = metrics.went_back_from(records, int(current.step))
    skips = config.faults.on_nonfinite == "skip"
    steps = _programs(config, run, skips=skips)
    careful_steps = _programs(config, run, skips=True) if careful_until else steps
    losses = list(metrics.recorded(records, "train", "loss").values())
    # Steps that were skipped, by the record that told of them.
    left = metrics.recorded(records, "train", "skipped")
    rows = run.placement.rows(config.batch_size)
    compare(current)  # all hosts have found the same checkpoint
    at_start = checks.start_of(config, run.initial)
    observe = None
    if methods.rewires(config):
        observe = health.observer(run.initial, sparsity.distribution(config)(run.shapes))
    start = int(current.step)
    warned = metrics.warnings(records)
    watch.warn(start, _left_out(run), warned)
    rate = measured_before = checkpoints.steps_per_second(saved, start)
    began = time.monotonic()
    called: set[step.TrainStep] = set()

    def speed(done: int) -> float:
        # The first step of each program compiles, and is not counted.
        timed = done - start - len(called)
        return timed / (time.monotonic() - began) if timed > 0 else measured_before

    behind = state.skipped(current)
    shown: dict[str, str] = {}

    def make_batch(at: int) -> Any:
        return run.placement.put(run.task.training_batch(config, at, rows))

    with (
        ahead(make_batch, start, config.steps) as made,
        display.training_progress(console, start, config.steps) as show,
    ):
        for done, batch in zip(range(start + 1, config.steps + 1), made, strict=True):
            looks = observe is not None and methods.is_observed(config, done - 1)
            before = health.masks_before(current) if looks else None
            # The history stays outside: an ordinary step would pay for passing it through.
            programs = careful_steps if done <= careful_until else steps
            take = programs[methods.is_rewiring(config, done - 1 - behind)]
            is_new = take not in called
            if is_new:
                jax.block_until_ready(current)
                stopped = time.monotonic() if called else began
            current = take(current._replace(history=None), batch)._replace(history=current.history)
            if skips or done <= careful_until:
                behind = state.skipped(current)
            if observe is not None and before is not None:
                current, values = observe(before, current)
                if not methods.find(config).keeps_counts:
                    values[metrics.FORWARD_FLOPS] = tally.look(done, current)
                write("rewiring", done, values)
                if config.faults.compare_at_rewirings:
                    compare(current)
            if is_new:
                called.add(take)
                jax.block_until_ready(current)  # compiled by now: the clock goes on
                began += time.monotonic() - stopped
            is_last = done == config.steps
            if is_last or done % config.log.every == 0:
                recovery.check(current)
                values, warnings = checks.training_record(config, current, at_start)
                warnings |= _left_out(run)
                write("train", done, values)
                if "skipped" in values:
                    left[done] = values["skipped"]
                    recovery.check_skipped(left, done, config.log.every)
                if "loss" in values:
                    losses = [*losses[-recovery.RECORDS :], values["loss"]]
                    if leap := recovery.spike(losses):
                        write("spike", done, {"loss": values["loss"]})
                        warnings["spike"] = f"step {done}: {leap}"
                    shown["loss"] = f"{values['loss']:.4f}"
                    shown["acc"] = f"{100 * values['accuracy']:.2f} %"
                watch.warn(done, warnings, warned)
            if is_last or done % config.eval.every == 0:
                validation = evaluate(current, run.dataset.validation)
                recovery.check_evaluation("validation", validation, done)
                write("validation", done, validation)
                shown["val"] = judged.text(validation)
                ranks[done] = judged.rank(validation)
            if is_last or done % config.log.every == 0 or done % config.eval.every == 0:
                show(done, "  ".join(f"{name} {value}" for name, value in shown.items()))
            is_due = config.checkpoint.every and done % config.checkpoint.every == 0
            status = stop(done)
            is_stopped = status and not is_last
            if is_last or is_due or is_stopped:
                recovery.check(current)
                compare(current)
                if hosts.is_first():
                    metrics.sync(workdir / metrics.FILE)  # never behind a checkpoint
                rate = speed(done)
                checkpoints.save(saved, current, config, rate, data)
            if is_stopped:
                raise signals.StoppedError(
                    f"asked to stop: saved at step {done} of {config.steps}", status
                )
    watch.warn(config.steps, checks.stray(config, current), warned)
    if left:
        warned["skipped"] = checks.skipped(left)
    return current, rate, warned
