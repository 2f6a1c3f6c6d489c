"""The compiled steps of a run, and which of them takes which step."""

from rigl_optax.training import step
from rigl_optax.training.setup import Run
from rigl_optax.training.state import TrainState


class Programs:
    """Chooses the compiled program for each step; each is compiled when it is first called.

    There are up to four: ordinary steps and rewirings, where the representation has a program of
    its own for those, and both again with a choice at the end that skips what is not finite.
    """

    def __init__(self, run: Run, state: TrainState, *, skip_until: int = 0) -> None:
        """Compiles nothing yet.

        Args:
          run: The run.
          state: The state to go on from.
          skip_until: Up to this step those that are not finite are skipped, under any policy.
        """
        self._run = run
        is_skipping = run.config.faults.on_nonfinite == "skip"
        self._skip_until = run.config.steps if is_skipping else skip_until
        self._compiled: dict[tuple[bool, bool], step.TrainStep] = {}
        self._delay = run.representation.delay(state)

    def choose(self, done: int) -> step.TrainStep:
        """Returns the program for the step after which `done` are done."""
        run, skips = self._run, done <= self._skip_until
        rewires = run.rewirings.happen_at(done - 1 - self._delay)
        key = skips, rewires and run.representation.has_rewiring_program
        if key not in self._compiled:
            self._compiled[key] = step.make_train_step(run, skips=key[0], rewires=key[1])
        return self._compiled[key]

    def note(self, done: int, state: TrainState) -> None:
        """Notes whether the optimizer has seen the step, where it may have been skipped."""
        if done <= self._skip_until:
            self._delay = self._run.representation.delay(state)
