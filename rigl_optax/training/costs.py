"""What a run will be and cost: explained before its first step, and added up on the way."""

import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from rigl_optax import _paths, accounting
from rigl_optax.accounting import explanation
from rigl_optax.training import checkpoints, checks, files, methods, setup
from rigl_optax.training import config as config_lib
from rigl_optax.training import state as state_lib
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


def explain(config: Config, run: Run) -> accounting.Explanation | None:
    """What will be sparse, and what it saves; None for a network made small, which has no masks."""
    if methods.find(config).narrow:
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
        design, run.shapes, method=config.method.name, spent_before=before, **about
    )


class Tally:
    """Training FLOPs as they are spent, at the masks of the moment.

    Between two looks at the masks their cost is taken to be what it was at the first: exact where
    they only change at rewirings.
    """

    def __init__(self, config: Config, run: Run, looks: Sequence[tuple[int, float]] = ()) -> None:
        """Counts FLOPs from the model's jaxpr; nothing is computed.

        Args:
          config: The run's.
          run: The run.
          looks: Of a run that is resumed: updates done, and `forward_flops` then.
        """
        method = methods.find(config)
        self._config = config
        self._flops = accounting.count_flops(_forward(run), run.shapes, *run.task.example(config))
        dense = first = float(self._flops.total)
        wider = None
        if method.masked:
            first = self._of_masks(run.initial)
            if method.cost.ordinary.is_wider:
                wider = self._of_marks(run.initial.opt_state.memory.second_masks)
        self._counter = accounting.FlopsCounter(
            method.cost,
            methods.plan(config),
            dense,
            first,
            batch_size=config.batch_size,
            f_wider=wider,
        )
        for done, forward in looks:
            self._counter.note(done, forward)
        self._ticket = _cost_of_ticket(config)
        # A network that is not the config's has another dense cost to be compared with.
        self.dense = dense
        self.reference = _reference(config) if method.narrow else dense

    def look(self, done: int, state: TrainState) -> float:
        """Notes what a forward pass costs after so many updates, and returns it."""
        forward = self._of_masks(state)
        self._counter.note(done, forward)
        return forward

    def spent(self, steps: int) -> float:
        """Training FLOPs after so many steps, from the beginning."""
        return self._ticket + self._counter.spent(steps)

    def flops(self) -> Flops:
        """Of the whole run, with the masks of the last look."""
        dense_step = accounting.METHODS["dense"].ordinary.flops(self.reference, self.reference)
        steps = self._config.steps
        return Flops(
            self._counter.f_sparse,
            self.reference,
            self.spent(steps),
            dense_step * self._config.batch_size * steps,
        )

    def _of_masks(self, state: TrainState) -> float:
        sizes = state_lib.sizes(state)
        active = checks.active_weights(self._config, state)
        sparsity = {path: 1 - active[path] / sizes[path] for path in active}
        return accounting.flops_at_sparsity(self._flops, sparsity)

    def _of_marks(self, marks: PyTree) -> float:
        """FLOPs of a forward pass of marked weights; dense where a leaf has no marks."""
        found = dict(_paths.flatten_with_paths(marks))
        active = jax.device_get({path: _count_true(mask) for path, mask in found.items()})
        sparsity = {path: 1 - int(active[path]) / mask.size for path, mask in found.items()}
        return accounting.flops_at_sparsity(self._flops, sparsity)


@jax.jit
def _count_true(mask: jax.Array) -> jax.Array:
    return jnp.sum(mask, dtype=jnp.int32)


def _reference(config: Config) -> float:
    """FLOPs of a dense forward pass of the network that a narrow one stands in for."""
    whole = setup.prepare(config_lib.changed(config, {"method.name": "dense"}))
    example = whole.task.example(config)
    return float(accounting.count_flops(_forward(whole), whole.shapes, *example).total)


def _cost_of_ticket(config: Config) -> float:
    """FLOPs of finding the masks that a run starts from."""
    if not config.method.ticket:
        return 0.0
    path = pathlib.Path(config.method.ticket) / checkpoints.RESULT_FILE
    if not path.exists():
        raise ValueError(
            f"config.method.ticket={config.method.ticket!r}: that run has no {path.name}"
        )
    return float(files.read(path, "the result of a run", files.RESULT)["flops"]["training"])


def _forward(run: Run) -> Callable[..., jax.Array]:
    """The forward pass of one example, of parameters and the task's inputs."""
    # Of the state only shapes matter here: its arrays may be spread over several hosts.
    model_state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), run.initial.model_state)
    model_state = jax.tree.map(jnp.asarray, run.task.at_rest(model_state, 1))

    def forward(params: PyTree, *inputs: jax.Array) -> jax.Array:
        model = nnx.merge(run.graphdef, params, model_state)
        model.eval()
        return model(*inputs)

    return forward
