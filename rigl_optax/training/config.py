"""The keys a config has, checked once before anything runs."""

import ast
import dataclasses
from collections.abc import Mapping
from typing import Any

# What does not change the numbers a run computes: these may differ when it is resumed.
BOOKKEEPING = frozenset(
    {
        "data_dir",
        "log_every",
        "eval_every",
        "eval_batch_size",
        "checkpoint_every",
        "keep_checkpoints",
        "mesh_data",
        "mesh_params",
        "mesh_axes",
        "compare_at_rewirings",
        "on_nonfinite",
        "max_bad_records",
    }
)

# What a field of each type may be read from; a bool is no integer.
_KINDS: dict[Any, tuple[type, ...]] = {
    str: (str,),
    bool: (bool,),
    int: (int,),
    float: (float, int),
    tuple[int, ...]: (tuple, list),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """One training run. Config files list all keys; there are no defaults.

    Attributes:
      dataset: `digits` or `fashion_mnist`; or texts: `wikitext103`, `tdavid`, `topics`, or `text`
        for the files of a folder.
      data_dir: Where the dataset is; empty for its usual place.
      model: `lenet`; for texts `gru` or `lstm`.
      hidden: Widths of the hidden layers.
      model_options: More arguments of the model, as `embedding=64,tied=False`; empty for none.
      sequence_length: Bytes of a sequence, through which gradients flow; 0 for images.
      method: A name in `rigl_optax.training.methods.METHODS`.
      sparsity: Overall fraction of zeros in the sparse layers; `dense` ignores it.
      distribution: `erk`, `erdos_renyi` or `uniform`, which may have options: sparsities of single
        layers by patterns of their paths, as `uniform(overrides={'reset/kernel': 0.5})`.
      method_options: More arguments of the method, as `momentum=0.99,redistribute=True`; empty
        for none.
      ticket: Workdir of the finished run whose masks `lottery` methods start from; else empty.
      structure: What lives and dies together, as `Block(16, 16)`, or by patterns of paths as
        `{'layers/0': Block(16, 16)}`; empty for single weights.
      rewire_every: Steps between rewirings (Delta T).
      rewire_until: The fraction of the training steps after which rewiring ends (T_end).
      drop_fraction: Fraction of active weights replaced at the first rewiring; cosine to 0.
      steps: Training steps.
      batch_size: Examples in a training batch; of a text, lanes that are read side by side.
      optimizer: `sgd`, with Nesterov momentum, or `adam`.
      learning_rate: At the first step.
      schedule: Of the learning rate: `cosine` to 0 at the last step, or `constant`.
      momentum: Of SGD; Adam's first decay rate (b1).
      gradient_clip: The largest global norm of the gradient that the optimizer sees; 0 for any.
      weight_decay: L2 on the kernels, as in the loss term (weight_decay / 2) * |w|^2.
      seed: For initial weights, masks and the order of the data.
      log_every: Steps between records of the training loss.
      eval_every: Steps between evaluations on the validation split.
      eval_batch_size: Examples in an evaluation batch, or lanes.
      checkpoint_every: Steps between checkpoints; 0 for none but the last.
      keep_checkpoints: How many of the newest to keep.
      mesh_data: Devices along which the state is repeated; 0 for all there are, divided by
        `mesh_params`. The batch is spread over all devices of the mesh.
      mesh_params: Devices among which parameters, masks and optimizer state are cut up.
      mesh_axes: `auto` or `explicit`: whether shardings are a part of the types.
      compare_at_rewirings: Compare the masks of all devices after every rewiring, not only
        before a checkpoint.
      on_nonfinite: What to do when a loss, a gradient or a weight is not finite: `stop`; `skip`
        the step, at the cost of looking at all gradients at every step; or `rollback` to the last
        checkpoint, and from there skip such steps until past the place.
      max_bad_records: How many records of a dataset may be left out since they cannot be read.
    """

    dataset: str
    data_dir: str
    model: str
    hidden: tuple[int, ...]
    model_options: str
    sequence_length: int
    method: str
    sparsity: float
    distribution: str
    method_options: str
    ticket: str
    structure: str
    rewire_every: int
    rewire_until: float
    drop_fraction: float
    steps: int
    batch_size: int
    optimizer: str
    learning_rate: float
    schedule: str
    momentum: float
    gradient_clip: float
    weight_decay: float
    seed: int
    log_every: int
    eval_every: int
    eval_batch_size: int
    checkpoint_every: int
    keep_checkpoints: int
    mesh_data: int
    mesh_params: int
    mesh_axes: str
    compare_at_rewirings: bool
    on_nonfinite: str
    max_bad_records: int

    def __post_init__(self) -> None:
        lowest = {
            "steps": 1,
            "log_every": 1,
            "eval_every": 1,
            "eval_batch_size": 1,
            "keep_checkpoints": 1,
            "checkpoint_every": 0,
            "seed": 0,
            "mesh_data": 0,
            "mesh_params": 1,
            "max_bad_records": 0,
            "sequence_length": 0,
            "gradient_clip": 0,
        }
        for name, bound in lowest.items():
            if getattr(self, name) < bound:
                raise ValueError(f"config.{name}={getattr(self, name)}: must be at least {bound}")
        if not 0 < self.rewire_until <= 1:
            raise ValueError(
                f"config.rewire_until={self.rewire_until}: must be in (0, 1], a fraction of the run"
            )

    @property
    def rewire_end(self) -> int:
        """The step from which on nothing is rewired (T_end)."""
        return max(1, round(self.rewire_until * self.steps))


def known_keys() -> list[str]:
    """All keys of a config, in alphabetical order."""
    return sorted(field.name for field in dataclasses.fields(Config))


def from_mapping(values: Mapping[str, Any]) -> Config:
    """A checked `Config` from an `ml_collections.ConfigDict`, or from a dict read from JSON.

    Raises:
      ValueError: If keys are missing or unknown, or a value makes no sense; it lists the
        known keys.
    """
    known = known_keys()
    unknown = sorted(set(values) - set(known))
    missing = sorted(set(known) - set(values))
    if unknown or missing:
        problem = [f"unknown keys {unknown}"] * bool(unknown) + [f"no {missing}"] * bool(missing)
        raise ValueError(f"config: {', '.join(problem)}; known keys are {', '.join(known)}")
    for field in dataclasses.fields(Config):
        value, allowed = values[field.name], _KINDS[field.type]
        if type(value) not in allowed:
            names = " or ".join(kind.__name__ for kind in allowed)
            raise ValueError(f"config.{field.name}={value!r}: must be {names}")
    hidden = tuple(values["hidden"])
    if not all(type(width) is int for width in hidden):
        raise ValueError(f"config.hidden={hidden!r}: must be integers")
    return Config(**{**values, "hidden": hidden})


def to_json(config: Config) -> dict[str, Any]:
    """The config as JSON can hold it; `from_mapping` reads it back."""
    return dataclasses.asdict(config) | {"hidden": list(config.hidden)}


def differences(saved: Mapping[str, Any], config: Config) -> list[str]:
    """Keys that change the numbers and differ, as `key: saved -> now`."""
    now = to_json(config)
    return [
        f"{key}: {saved.get(key, 'absent')!r} -> {now.get(key, 'absent')!r}"
        for key in sorted((set(saved) | set(now)) - BOOKKEEPING)
        if saved.get(key, "absent") != now.get(key, "absent")
    ]


def keywords(words: str, key: str, example: str) -> dict[str, Any]:
    """Keyword arguments from a string of a config; literals only, nothing is executed.

    Raises:
      ValueError: If it cannot be read.
    """
    try:
        call = ast.parse(f"f({words})", mode="eval").body
        assert isinstance(call, ast.Call) and not call.args
        return {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
    except (SyntaxError, ValueError, AssertionError, RecursionError, MemoryError):
        raise ValueError(f"config.{key}={words!r}: must be like {example!r}") from None
