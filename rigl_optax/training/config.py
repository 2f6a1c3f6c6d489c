"""The keys a config has, checked once before anything runs."""

import ast
import dataclasses
import itertools
import math
from collections.abc import Mapping
from typing import Any

# What does not change the numbers a run computes: these may differ when it is resumed. For the two
# that sometimes do, see `differences`.
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
        "max_rollbacks",
        "max_bad_records",
        "loader_threads",
    }
)

# Datasets that are what `data_dir` holds: elsewhere it only says where the same data are.
FROM_FOLDER = ("text", "image_folder")
PHOTOS = ("imagenet2012", "image_folder")

# Keys that earlier versions did not have, and what those did: their runs can be resumed and read.
ADDED: dict[str, Any] = {
    "image_size": 0,
    "augment": "none",
    "loader_threads": 1,
    "width": 1.0,
    "dense_layers": "default",
    "compute_dtype": "float32",
    "prune_from": 0.2,
    "warmup": 0.0,
    "decay_at": (),
    "decay_factor": 1.0,
    "weight_decay_on": "kernels",
    "label_smoothing": 0.0,
    "structure": "",
    "condensed": False,
    "validation_fraction": 0.0,
    "max_rollbacks": 10,
}

# What a key may be.
CHOICES = {
    "augment": ("none", "pad_crop", "resized_crop"),
    "compute_dtype": ("float32", "bfloat16"),
    "schedule": ("constant", "cosine", "step"),
    "weight_decay_on": ("kernels", "kernels_but_depthwise", "all"),
}

# What a field of each type may be read from; a bool is no integer.
_KINDS: dict[Any, tuple[type, ...]] = {
    str: (str,),
    bool: (bool,),
    int: (int,),
    float: (float, int),
    tuple[int, ...]: (tuple, list),
    tuple[float, ...]: (tuple, list),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """One training run. Config files list all keys; there are no defaults.

    Attributes:
      dataset: Images: `digits`, `fashion_mnist`, `cifar10`; `imagenet2012`, or `image_folder` for a
        tree of photos. Texts: `wikitext103`, `tdavid`, `topics`, or `text` for files of a folder.
      data_dir: Where the dataset is; empty for its usual place.
      validation_fraction: Of the training photos (`imagenet2012`, `image_folder`), held out for
        validation; 0 for 1 %, and of small trees at least 500 or a tenth, whichever is less.
      image_size: Images are resized to so many pixels a side; 0 for as they are stored, but not of
        photos, which are stored in many sizes.
      augment: Of training images: `none`; `pad_crop`, 4 mirrored pixels on each side, a random crop
        of the size, a flip (CIFAR); `resized_crop`, a random part of the image resized to the
        size, a flip (ImageNet).
      loader_threads: Threads of each host that read and decode images; the batches are the same.
      model: A name in `rigl_optax.training.architectures.ARCHITECTURES`; for texts `gru` or `lstm`.
      hidden: Widths of the hidden layers, of models that leave them open; else empty.
      width: By which all hidden widths are multiplied. `small_dense` chooses a smaller one itself.
      dense_layers: Which kernels stay dense: `default`, those that the paper keeps so in this model
        and distribution; `none`; or a regular expression of their paths.
      compute_dtype: Of activations and products: `float32` or `bfloat16`. Parameters, batch
        statistics and the loss are float32.
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
        `{'layers/0': Block(16, 16)}`; empty for single weights. With `condensed` also `measured`:
        the quickest blocks of each layer, and dense where that is quicker (`condensed.choose`).
      condensed: Whether sparse kernels are kept as their blocks alone, so that time and memory
        follow the density (`rigl_optax.condensed`): same masks and weights as without, up to
        rounding. For methods `static`, `set` and `rigl`, with a `Block` in `structure` for each
        sparse layer, and `mesh_params` of 1.
      rewire_every: Steps between rewirings (Delta T).
      rewire_until: The fraction of the training steps after which rewiring ends (T_end).
      drop_fraction: Fraction of active weights replaced at the first rewiring; cosine to 0.
      prune_from: The fraction of the training steps after which gradual pruning begins.
      steps: Training steps. Training M times as long is M times the steps: what is told in
        fractions of them (rewire_until, warmup, decay_at, prune_from) scales, rewire_every doesn't.
      batch_size: Examples in a training batch; of a text, lanes that are read side by side.
      optimizer: `sgd`, with Nesterov momentum; `heavy_ball`, SGD with the ordinary one; or `adam`.
      learning_rate: At its highest.
      schedule: Of the learning rate: `cosine` to 0 at the last step, `constant`, or `step`.
      warmup: The fraction of the training steps in which the rate rises linearly from 0.
      decay_at: For `step`, and else empty: fractions of the training steps, ascending.
      decay_factor: By which the rate is multiplied at each of them.
      momentum: Of SGD; Adam's first decay rate (b1).
      gradient_clip: The largest global norm of the gradient that the optimizer sees; 0 for any.
      weight_decay: L2, as in the loss term (weight_decay / 2) * |w|^2.
      weight_decay_on: Of `kernels`, which have two dimensions or more; `kernels_but_depthwise`; or
        `all`, biases and normalisation as well.
      label_smoothing: The part of each label that is spread evenly over all classes; in training.
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
      compare_at_rewirings: Compare the masks and weights of all devices after every rewiring, not
        only before a checkpoint.
      on_nonfinite: What to do when a loss, a gradient or a weight is not finite: `stop`; `skip`
        the step, at the cost of looking at all gradients at every step; or `rollback` to the last
        checkpoint, and from there skip such steps until past the place. 50 steps skipped in a row
        end the run, and so does a validation or test loss that is not finite.
      max_rollbacks: How often a run goes back before it ends with the error.
      max_bad_records: How many records of a dataset may be left out since they cannot be read; of
        photos, by each process.
    """

    dataset: str
    data_dir: str
    validation_fraction: float
    image_size: int
    augment: str
    loader_threads: int
    model: str
    hidden: tuple[int, ...]
    width: float
    dense_layers: str
    compute_dtype: str
    model_options: str
    sequence_length: int
    method: str
    sparsity: float
    distribution: str
    method_options: str
    ticket: str
    structure: str
    condensed: bool
    rewire_every: int
    rewire_until: float
    drop_fraction: float
    prune_from: float
    steps: int
    batch_size: int
    optimizer: str
    learning_rate: float
    schedule: str
    warmup: float
    decay_at: tuple[float, ...]
    decay_factor: float
    momentum: float
    gradient_clip: float
    weight_decay: float
    weight_decay_on: str
    label_smoothing: float
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
    max_rollbacks: int
    max_bad_records: int

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            values = value if isinstance(value, tuple) else (value,)
            if any(isinstance(x, float) and not math.isfinite(x) for x in values):
                raise ValueError(f"config.{field.name}={value}: must be finite")
        if any(width < 1 for width in self.hidden):
            raise ValueError(f"config.hidden={self.hidden}: must be at least 1 each")
        lowest = {
            "steps": 1,
            "batch_size": 1,
            "rewire_every": 1,
            "learning_rate": 0,
            "weight_decay": 0,
            "log_every": 1,
            "eval_every": 1,
            "eval_batch_size": 1,
            "keep_checkpoints": 1,
            "checkpoint_every": 0,
            "seed": 0,
            "mesh_data": 0,
            "mesh_params": 1,
            "max_bad_records": 0,
            "max_rollbacks": 0,
            "sequence_length": 0,
            "gradient_clip": 0,
            "image_size": 0,
            "loader_threads": 1,
        }
        for name, bound in lowest.items():
            if getattr(self, name) < bound:
                raise ValueError(f"config.{name}={getattr(self, name)}: must be at least {bound}")
        for name in ("steps", "rewire_every", "batch_size", "eval_batch_size", "seed"):
            if getattr(self, name) >= 2**31:
                raise ValueError(f"config.{name}={getattr(self, name)}: must be below 2**31")
        if not 0 <= self.drop_fraction <= 1:
            raise ValueError(f"config.drop_fraction={self.drop_fraction}: must be in [0, 1]")
        if not 0 < self.rewire_until <= 1:
            raise ValueError(
                f"config.rewire_until={self.rewire_until}: must be in (0, 1], a fraction of the run"
            )
        fractions = ("warmup", "prune_from", "label_smoothing", "sparsity", "momentum")
        for name in (*fractions, "validation_fraction"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"config.{name}={getattr(self, name)}: must be in [0, 1)")
        for name in ("width", "decay_factor"):
            if getattr(self, name) <= 0:
                raise ValueError(f"config.{name}={getattr(self, name)}: must be positive")
        if self.validation_fraction and self.dataset not in PHOTOS:
            raise ValueError(
                f"config.validation_fraction={self.validation_fraction}: must be 0 for "
                f"{self.dataset}, whose splits are given; it is for {', '.join(PHOTOS)}"
            )
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"config.{name}={getattr(self, name)!r}: must be one of {', '.join(choices)}"
                )
        if (self.schedule == "step") != bool(self.decay_at):
            raise ValueError(
                f"config.decay_at={self.decay_at}: must be given for schedule='step' alone, and "
                f"this is {self.schedule!r}"
            )
        inside = [self.warmup, *self.decay_at, 1.0]
        if any(early >= late for early, late in itertools.pairwise(inside)):
            raise ValueError(
                f"config.decay_at={self.decay_at}: must be ascending fractions of the run, after "
                f"the warmup of {self.warmup} and before 1"
            )

    @property
    def rewire_end(self) -> int:
        """The step from which on nothing is rewired (T_end)."""
        return max(1, round(self.rewire_until * self.steps))

    def step_at(self, fraction: float) -> int:
        """The step that lies after this fraction of the run."""
        return round(fraction * self.steps)


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
    tuples = {}
    for name, item, kind in (("hidden", int, "integers"), ("decay_at", float, "floats")):
        tuples[name] = tuple(values[name])
        if not all(type(value) in _KINDS[item] for value in tuples[name]):
            raise ValueError(f"config.{name}={tuples[name]!r}: must be {kind}")
    return Config(**{**values, **tuples})


def from_saved(values: Mapping[str, Any]) -> Config:
    """The config of an earlier run, of this version or one that had fewer keys.

    Raises:
      ValueError: As `from_mapping`.
    """
    return from_mapping({**ADDED, **values})


def to_json(config: Config) -> dict[str, Any]:
    """The config as JSON can hold it; `from_mapping` reads it back."""
    values = dataclasses.asdict(config)
    return {key: list(x) if isinstance(x, tuple) else x for key, x in values.items()}


def differences(saved: Mapping[str, Any], config: Config) -> list[str]:
    """Keys that change the numbers and differ, as `key: saved -> now`.

    Of a text the lanes of an evaluation do, since each begins without a state; and `data_dir` does
    where the dataset is whatever it holds.
    """
    added = {key: list(x) if isinstance(x, tuple) else x for key, x in ADDED.items()}
    saved, now = {**added, **saved}, to_json(config)
    free = set(BOOKKEEPING)
    if config.sequence_length:
        free.remove("eval_batch_size")
    if config.dataset in FROM_FOLDER:
        free.remove("data_dir")
    return [
        f"{key}: {saved.get(key, 'absent')!r} -> {now.get(key, 'absent')!r}"
        for key in sorted((set(saved) | set(now)) - free)
        if saved.get(key, "absent") != now.get(key, "absent")
    ]


def keywords(words: str, key: str, example: str) -> dict[str, Any]:
    """Keyword arguments from a string of a config; literals only, nothing is executed.

    Raises:
      ValueError: If it cannot be read.
    """
    try:
        call = ast.parse(f"f({words})", mode="eval").body
        if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name)) or call.args:
            raise ValueError("not keyword arguments alone")
        if any(keyword.arg is None for keyword in call.keywords):
            raise ValueError("not keyword arguments alone")
        return {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise ValueError(f"config.{key}={words!r}: must be like {example!r}") from None
