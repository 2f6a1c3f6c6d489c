"""What is recorded, evaluated, shown and saved while a run trains."""

import contextlib
import functools
import pathlib
from collections.abc import Iterator
from typing import NamedTuple

from rich.console import Console

from rigl_optax.training import (
    checkpoints,
    checks,
    costs,
    display,
    evaluation,
    fingerprint,
    health,
    hosts,
    metrics,
    recovery,
)
from rigl_optax.training.clock import Clock
from rigl_optax.training.setup import Run
from rigl_optax.training.state import TrainState


class Launch(NamedTuple):
    """One start of a run; it stays the same when the run goes back to a checkpoint.

    Attributes:
      run: The run.
      initial: Masks of the state at step 0, and shapes of the rest.
      workdir: Where its files go.
      saved: Its checkpoints.
      data: The fingerprints of its data, from `data_fingerprint.of`.
      ranks: `{step: rank}` of each evaluation on the validation split; grows.
      evaluate: From `evaluation.evaluator`.
      compare: From `fingerprint.comparer`.
      console: Where it prints.
    """

    run: Run
    initial: TrainState
    workdir: pathlib.Path
    saved: checkpoints.Checkpoints
    data: dict[str, str]
    ranks: dict[int, float]
    evaluate: evaluation.Evaluate
    compare: fingerprint.Compare
    console: Console

    def read_records(self) -> metrics.Records:
        """Reads all records on disk; process 0 does, and tells the others."""
        return hosts.first_tells(lambda: metrics.read(self.workdir / metrics.FILE))


@contextlib.contextmanager
def recording(launch: Launch, start: int, records: metrics.Records) -> Iterator["Recorder"]:
    """Opens the files of records, to go on at a step; later records are dropped.

    Args:
      launch: The launch.
      start: Steps done.
      records: What is on disk.
    """
    kept = metrics.until(records, start)
    flops = costs.TrainingFlops(launch.run, launch.initial, metrics.forward_flops(kept, start))
    open_files = functools.partial(
        metrics.writer,
        launch.workdir,
        resumed_at=start,
        spent=flops.spent,
        say=launch.console.print,
    )
    with hosts.first_enters(open_files, elsewhere=metrics.write_nothing) as write:
        yield Recorder(launch, start, kept, metrics.warnings(records), flops, write)


class Recorder:
    """Records a run from the step where it goes on; one method for each occasion.

    Attributes:
      flops: The training FLOPs so far.
      clock: The clock of the run.
      steps_per_second: As last measured.
      warnings: All warnings so far, by kind, also of earlier launches.
      went_back_from: The step from which the run has gone back to here; 0 if it has not.
    """

    def __init__(
        self,
        launch: Launch,
        start: int,
        records: metrics.Records,
        printed: dict[str, str],
        flops: costs.TrainingFlops,
        write: metrics.Write,
    ) -> None:
        """Goes on with what earlier launches have recorded.

        Args:
          launch: The launch.
          start: Steps done.
          records: Records up to there.
          printed: Warnings that have been printed before, some of steps that are done again.
          flops: The training FLOPs so far.
          write: Writes a record.
        """
        run = launch.run
        self._launch, self._run, self._config, self.write = launch, run, run.config, write
        self.flops = flops
        self.steps_per_second = checkpoints.steps_per_second(launch.saved, start)
        self.clock = Clock(start, self.steps_per_second)
        self.warnings, self._printed = metrics.warnings(records), printed
        self.went_back_from = metrics.went_back_from(records, start)
        self._at_start = checks.start_of(run, launch.initial)
        self._observe = health.observer(run, launch.initial) if run.rewirings.happen else None
        self._losses = list(metrics.recorded(records, "train", "loss").values())
        # Steps that were skipped, by the step of the record that counts them.
        self._skipped = metrics.recorded(records, "train", "skipped")
        self._shown: dict[str, str] = {}
        self._show: display.Show = lambda step, text: None
        self._start = start
        self._warn(start, self._bad_records())

    @contextlib.contextmanager
    def progress(self) -> Iterator[None]:
        """Shows the progress of the run meanwhile."""
        steps = self._config.steps
        with display.training_progress(self._launch.console, self._start, steps) as self._show:
            yield

    def observes(self, done: int) -> bool:
        """Tells whether `rewiring` is to be called after the step with which `done` are done."""
        return self._observe is not None and self._run.rewirings.are_observed_at(done - 1)

    def rewiring(self, done: int, before: health.PyTree, state: TrainState) -> TrainState:
        """Records a rewiring; returns the state with its history brought up to date.

        Args:
          done: Steps done.
          before: Copies of the masks before it, from `health.masks_before`.
          state: The state after it.
        """
        assert self._observe is not None
        state, values = self._observe(before, state)
        if not self._run.method.keeps_counts:
            values[metrics.FORWARD_FLOPS] = self.flops.record(done, state)
        self.write("rewiring", done, values)
        if self._config.faults.compare_at_rewirings:
            self._launch.compare(state)
        return state

    def training(self, done: int, state: TrainState) -> None:
        """Records the training loss since the last record, and warns of what is wrong."""
        recovery.check(state)
        values, warnings = checks.training_record(self._run, state, self._at_start)
        warnings |= self._bad_records()
        self.write("train", done, values)
        if "skipped" in values:
            self._skipped[done] = values["skipped"]
            recovery.check_skipped(self._skipped, done, self._config.log.every)
        if "loss" in values:
            self._losses = [*self._losses[-recovery.RECORDS :], values["loss"]]
            if leap := recovery.spike(self._losses):
                self.write("spike", done, {"loss": values["loss"]})
                warnings["spike"] = f"step {done}: {leap}"
            self._shown["loss"] = f"{values['loss']:.4f}"
            self._shown["acc"] = f"{100 * values['accuracy']:.2f} %"
        self._warn(done, warnings)

    def validation(self, done: int, state: TrainState) -> None:
        """Evaluates on the validation split and records it."""
        score = self._run.task.score
        measured = self._launch.evaluate(state, self._run.dataset.validation)
        recovery.check_evaluation("validation", measured, done)
        self.write("validation", done, measured)
        self._shown["val"] = score.text(measured)
        self._launch.ranks[done] = score.rank(measured)

    def show(self, done: int) -> None:
        """Shows what was last measured."""
        self._show(done, "  ".join(f"{name} {value}" for name, value in self._shown.items()))

    def checkpoint(self, done: int, state: TrainState) -> None:
        """Saves the state, unless it is not finite or devices disagree."""
        recovery.check(state)
        self._launch.compare(state)
        if hosts.is_first():
            # On disk before the checkpoint is: a run that goes on from it has all records.
            metrics.sync(self._launch.workdir / metrics.FILE)
        self.steps_per_second = self.clock.steps_per_second(done)
        checkpoints.save(
            self._launch.saved, state, self._config, self.steps_per_second, self._launch.data
        )

    def finish(self, end: TrainState) -> dict[str, dict[str, float]]:
        """Evaluates the last state on both other splits, and records that of the test split."""
        steps = self._config.steps
        self._warn(steps, checks.stray(self._run, end))
        if self._skipped:
            self.warnings["skipped"] = checks.skipped(self._skipped)
        dataset = self._run.dataset
        measured = {
            "validation": self._launch.evaluate(end, dataset.validation),
            "test": self._launch.evaluate(end, dataset.test),
        }
        for split, values in measured.items():
            recovery.check_evaluation(split, values, steps)
        self.write("test", steps, measured["test"])
        self.warnings |= self._bad_records()
        return measured

    def _warn(self, step: int, found: dict[str, str]) -> None:
        """Records warnings of a new kind, and prints those that were never printed."""
        for kind in [kind for kind in found if kind not in self.warnings]:
            self.warnings[kind] = found[kind]
            if kind not in self._printed:
                self._launch.console.print(f"warning: {found[kind]}", markup=False)
            self.write(metrics.WARNING, step, {metrics.WARNING: kind, "text": found[kind]})

    def _bad_records(self) -> dict[str, str]:
        """Warns if records of the dataset could not be read."""
        bad = self._run.task.bad_records
        if not bad:
            return {}
        return {
            "bad_records": f"{len(bad)} records of the dataset could not be read and are left "
            f"out; the first: {'; '.join(bad[:3])}"
        }
