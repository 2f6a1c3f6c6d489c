"""Explains what a run will cost before its first step, and adds it up on the way."""

import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from rigl_optax import _paths, accounting
from rigl_optax._wrapper._design import design_of
from rigl_optax.accounting import explanation
from rigl_optax.training import checkpoints, checks, files, methods, setup
from rigl_optax.training import config as config_lib
from rigl_optax.training.config import Config
from rigl_optax.training.setup import Run
from rigl_optax.training.state import TrainState

PyTree = Any


class Flops(NamedTuple):
    """FLOPs (multiplies plus adds) of a run, and of the dense run it is compared with.

    Attributes:
      inference: Of one forward pass of one example, with the masks.
      inference_dense: The same without masks.
      training: Of the whole run, and of the one its masks come from, if any.
      training_dense: Of dense training for as many steps.
    """

    inference: float
    inference_dense: float
    training: float
    training_dense: float


def explain(run: Run) -> accounting.Explanation | None:
    """Explains what will be sparse, and what it saves.

    None for a network made small, which has no masks.
    """
    config = run.config
    if run.method.narrow:
        return None
    about: dict[str, Any] = {
        "steps": config.steps,
        "model": _forward(run),
        "inputs": run.task.example(config),
    }
    design = methods.design(config, run.tx, run.shapes)
    if design is None:
        return accounting.explain(run.shapes, config.method.sparsity, method="dense", **about)
    before = _cost_of_ticket(config) / config.batch_size
    return explanation.explain_design(
        design,
        run.shapes,
        method=config.method.name,
        spent_before=before,
        batch_size=config.batch_size,
        **about,
    )


def planned(config: Config) -> float:
    """Returns the FLOPs of a whole training run, as far as they are known before it.

    Args:
      config: Of the run.

    Raises:
      ValueError: If the masks come from another run.
    """
    run = setup.prepare(config)
    if run.method.start == "ticket":
        raise ValueError(f"config.method.name={config.method.name!r}: starts from another run")
    example = run.task.example(config)
    dense = float(accounting.count_flops(_forward(run), run.shapes, *example).total)
    step = accounting.METHODS["dense"].ordinary.flops(dense, dense)
    explained = explain(run)
    ratio = 1.0 if explained is None else explained.training_ratio
    assert ratio is not None  # the model is given
    return ratio * step * config.batch_size * config.steps


class TrainingFlops:
    """Counts training FLOPs as they are spent, at the masks of the moment.

    Between two records the cost of a forward pass is taken to be that of the first: exact where
    masks only change at rewirings.
    """

    def __init__(
        self, run: Run, initial: TrainState, recorded: Sequence[tuple[int, float]] = ()
    ) -> None:
        """Counts the FLOPs of a forward pass from the model's jaxpr; nothing is computed.

        Args:
          run: The run.
          initial: The state at step 0; masks, and shapes of the rest, are enough.
          recorded: Of a run that is resumed: pairs of updates done and `forward_flops` then.
        """
        config, method = run.config, run.method
        self._run = run
        self._flops = accounting.count_flops(_forward(run), run.shapes, *run.task.example(config))
        dense = first = float(self._flops.total)
        wider = None
        if method.masked:
            first = self._at(initial)
            if method.cost.ordinary.is_wider:
                wider = self._at_second_masks(initial.opt_state.memory.second_masks)
        self._counter = accounting.FlopsCounter(
            method.cost,
            run.rewirings.plan,
            dense,
            first,
            batch_size=config.batch_size,
            f_wider=wider,
            per_rewiring=_rewiring_flops(run),
        )
        for done, forward in recorded:
            self._record(done, forward)
        self._ticket = _cost_of_ticket(config)
        # A network that is not the config's has another dense cost to be compared with.
        self._reference = _reference(run) if method.narrow else dense

    def record(self, done: int, state: TrainState) -> float:
        """Records what a forward pass costs after so many updates, and returns it."""
        forward = self._at(state)
        self._record(done, forward)
        return forward

    def spent(self, steps: int) -> float:
        """Returns the training FLOPs after so many steps, from the beginning."""
        return self._ticket + self._counter.spent(steps)

    def total(self) -> Flops:
        """Returns the FLOPs of the whole run, with the masks of the last record."""
        dense_step = accounting.METHODS["dense"].ordinary.flops(self._reference, self._reference)
        config = self._run.config
        return Flops(
            self._counter.f_sparse,
            self._reference,
            self.spent(config.steps),
            dense_step * config.batch_size * config.steps,
        )

    def _record(self, done: int, forward: float) -> None:
        """Records a forward pass; and those since the last record, where the schedule has them."""
        design, plan = design_of(self._run.tx), self._run.rewirings.plan
        if design is not None and design.method.progress is not None and plan is not None:
            # Masks that change at every step are not looked at each time.
            before, at_last = self._counter.f_sparse, self._counter.recorded
            steps = [t for t in plan.steps_before(done) if t >= at_last]
            progress = [design.method.progress(t) for t in (max(at_last - 1, 0), *steps)]
            way = progress[-1] - progress[0]
            for t, reached in zip(steps, progress[1:], strict=True):
                share = (reached - progress[0]) / way if way else 1.0
                self._counter.record(t + 1, before + share * (forward - before))
        self._counter.record(done, forward)

    def _at(self, state: TrainState) -> float:
        """Returns the FLOPs of a forward pass at the masks of a state."""
        sizes = self._run.representation.sizes(state)
        active = checks.active_weights(self._run, state)
        sparsity = {path: 1 - active[path] / sizes[path] for path in active}
        return accounting.flops_at_sparsity(self._flops, sparsity)

    def _at_second_masks(self, masks: PyTree) -> float:
        """Returns the FLOPs of a forward pass at these masks; dense where a leaf has none."""
        found = dict(_paths.flatten_with_paths(masks))
        active = jax.device_get({path: _count_true(mask) for path, mask in found.items()})
        sparsity = {path: 1 - int(active[path]) / mask.size for path, mask in found.items()}
        return accounting.flops_at_sparsity(self._flops, sparsity)


@jax.jit
def _count_true(mask: jax.Array) -> jax.Array:
    return jnp.sum(mask, dtype=jnp.int32)


def _reference(run: Run) -> float:
    """Returns the FLOPs of a dense forward pass of the network that a narrow one stands in for."""
    dense = config_lib.changed(run.config, {"method.name": "dense"})
    whole = setup.outline(dense, run.task.facts)
    example = whole.task.example(dense)
    return float(accounting.count_flops(_forward(whole), whole.shapes, *example).total)


def _rewiring_flops(run: Run) -> float:
    """Returns the FLOPs of a rewiring whatever the batch, beside those of its passes."""
    design = methods.design(run.config, run.tx, run.shapes)
    if design is None:
        return 0.0
    return explanation.rewiring_flops(design, design.layouts(run.shapes)[1])


def _cost_of_ticket(config: Config) -> float:
    """Returns the FLOPs of finding the masks that a run starts from."""
    if not config.method.ticket:
        return 0.0
    path = pathlib.Path(config.method.ticket) / checkpoints.RESULT_FILE
    if not path.exists():
        raise ValueError(
            f"config.method.ticket={config.method.ticket!r}: that run has no {path.name}"
        )
    return float(files.read(path, "the result of a run", files.RESULT)["flops"]["training"])


def _forward(run: Run) -> Callable[..., jax.Array]:
    """Returns the forward pass of one example, a function of parameters and the task's inputs."""
    model_state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), run.abstract.model_state)
    model_state = jax.tree.map(jnp.asarray, run.task.at_rest(model_state, 1))

    def forward(params: PyTree, *inputs: jax.Array) -> jax.Array:
        model = nnx.merge(run.graphdef, params, model_state)
        model.eval()
        return model(*inputs)

    return forward
