"""The config of a run: nested sections, their defaults, and every check that needs nothing else.

A recipe states what is special, as nested dicts; all other keys have the defaults that stand here.
Four sections are open: what they do not list goes, by its own name, to what the section names, the
model's class, the method's function, the optimizer of Optax, or the distribution.
"""

import dataclasses
import difflib
import itertools
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

# What does not change the numbers a run computes: these may differ when it is resumed. Two of them
# sometimes do: see `differences`.
BOOKKEEPING = frozenset(
    {
        "data.dir",
        "data.threads",
        "data.max_bad_records",
        "log.every",
        "eval.every",
        "eval.batch_size",
        "checkpoint.every",
        "checkpoint.keep",
        "mesh.data",
        "mesh.params",
        "mesh.axes",
        "faults.on_nonfinite",
        "faults.max_rollbacks",
        "faults.compare_at_rewirings",
    }
)

# Datasets that are what `data.dir` holds: elsewhere it only says where the same data are.
FROM_FOLDER = ("text", "tokens", "image_folder")
PHOTOS = ("imagenet2012", "image_folder")
TFDS = "tfds/"  # before the name of any set that TFDS has prepared
_MOST = 2**31  # integers stay below


def _key(default: Any, in_range: str = "", *, one_of: tuple[str, ...] = ()) -> Any:
    """A field with its default, and what it may be: a range as `[0, 1)`, or one of some words."""
    return dataclasses.field(default=default, metadata={"range": in_range, "one_of": one_of})


_DROP_SCHEDULES = ("cosine", "linear", "inverse_power", "stages", "constant")


def _options() -> Any:
    """The field of an open section that holds what the section does not list."""
    return dataclasses.field(default_factory=dict, hash=False, metadata={"open": True})


@dataclasses.dataclass(frozen=True)
class Data:
    """The dataset and how it is read.

    Attributes:
      name: Images: `digits`, `fashion_mnist`, `cifar10`, `imagenet2012`, `tfds/NAME` for any set
        that TFDS has prepared, or `image_folder` for a tree of photos. Texts: `wikitext103`,
        `tdavid`, `topics`, `text` for files of a folder, or `tokens` for nanoGPT's token files.
      dir: Directory of the dataset; empty for its usual place.
      validation: The fraction of the training photos (`imagenet2012`, `image_folder`, `tfds/NAME`)
        held out for validation; 0 for 1 %, and of small trees at least 500 or a tenth, whichever is
        less. Of `tfds/NAME` in memory 0 is its own split, or the last tenth, at most 5,000.
      image_size: Images are resized to this many pixels a side; 0 keeps the stored size, which
        photos do not share.
      augment: Augmentation of training images: `none`; `pad_crop`, 4 mirrored pixels on each side,
        a random crop of the size, a flip (CIFAR); `resized_crop`, a random part of the image
        resized to the size, a flip (ImageNet).
      standardise: Scale all images by the mean and the standard deviation over all pixels of the
        training split, instead of to [0, 1]; for `digits` and `fashion_mnist`. Where no
        normalisation follows, RigL bears higher learning rates with inputs of both signs.
      sequence_length: Bytes of a sequence, through which gradients flow; 0 for images.
      threads: Threads of each host that read and decode images. Batches do not depend on it.
      max_bad_records: How many unreadable records may be left out; of photos, by each process.
    """

    name: str = _key("digits")
    dir: str = _key("")
    validation: float = _key(0.0, "[0, 1)")
    image_size: int = _key(0, "[0, inf)")
    augment: str = _key("none", one_of=("none", "pad_crop", "resized_crop"))
    standardise: bool = _key(False)
    sequence_length: int = _key(0, "[0, inf)")
    threads: int = _key(1, "[1, inf)")
    max_bad_records: int = _key(0, "[0, inf)")


@dataclasses.dataclass(frozen=True)
class Model:
    """The network. Other keys are arguments of the model: `config.model.depth = 22`.

    Attributes:
      name: A name in `rigl_optax.training.architectures.ARCHITECTURES`; for texts `gru`, `lstm` or
        `gpt`.
      hidden: Widths of the hidden layers, for models that leave them open; else empty.
      width: Multiplies all hidden widths. `small_dense` chooses a smaller one itself.
      dtype: Of activations and products: `float32` or `bfloat16`. Parameters, batch statistics and
        the loss are float32.
      dense_layers: Which kernels stay dense: `default`, those that the paper keeps dense in this
        model and distribution; `none`; `nothing`, where biases, scales and embeddings are sparse
        too; or a regular expression searched in their paths.
      options: Arguments of the model.
    """

    name: str = _key("lenet")
    hidden: tuple[int, ...] = _key((), "[1, inf)")
    width: float = _key(1.0, "(0, inf)")
    dtype: str = _key("float32", one_of=("float32", "bfloat16"))
    dense_layers: str = _key("default")
    options: Mapping[str, Any] = _options()


@dataclasses.dataclass(frozen=True)
class Start:
    r"""Trained weights from which the run begins, in place of random ones.

    Methods that begin sparse take the largest weights of each layer for their first masks, those
    that begin dense go on from all of them. Batch statistics are read too, the optimizer starts
    anew. The file is read at step 0 alone. What it cost to train is counted nowhere.

    Attributes:
      path: A workdir of this library, an Orbax checkpoint or a safetensors file; empty for none.
      step: Of a workdir: `newest`, `best` on the validation split, or the step of a checkpoint.
      names: Pairs of a regular expression that matches the whole path of a parameter, and the name
        of its weights: `(("layers/(.*)", r"net/\1"),)`. The first that matches counts; others keep
        their path as name.
      keep: Patterns, searched in paths, of parameters that keep their random values, as a new head.
      layout: Of the kernels: `flax`, (window, in, out), or `pytorch`, (out, in, window).
    """

    path: str = _key("")
    step: str | int = _key("newest")
    names: tuple[tuple[str, str], ...] = _key(())
    keep: tuple[str, ...] = _key(())
    layout: str = _key("flax", one_of=("flax", "pytorch"))


@dataclasses.dataclass(frozen=True)
class Distribution:
    """How sparse each layer is. Other keys are arguments of the distribution: `power`, `overrides`.

    Attributes:
      name: `erk`, `erdos_renyi` or `uniform`.
      options: Arguments of the distribution. `overrides` are pairs of a pattern and a sparsity:
        `(("reset/kernel", 0.5),)`.
    """

    name: str = _key("erk", one_of=("erk", "erdos_renyi", "uniform"))
    options: Mapping[str, Any] = _options()


@dataclasses.dataclass(frozen=True)
class Structure:
    """Which weights are active or inactive together. Other keys are arguments of the structure.

    Attributes:
      name: `unstructured`, `block` (`rows`, `cols`, `pool_by`, `pad`), `nm` (`n`, `m`,
        `transposable`), `constant_fan_in` (`min_salient`); with `condensed` also `measured`: for
        each layer the fastest blocks by a measured table, and dense where that is faster.
      layers: Exceptions: pairs of a pattern of paths and a structure,
        `(("layers/0", {"name": "block", "rows": 16, "cols": 16}),)`.
      options: Arguments of the structure.
    """

    name: str = _key(
        "unstructured", one_of=("unstructured", "block", "nm", "constant_fan_in", "measured")
    )
    layers: tuple[tuple[str, "Structure"], ...] = _key(())
    options: Mapping[str, Any] = _options()


@dataclasses.dataclass(frozen=True)
class Method:
    """How the network is made sparse. Other keys are arguments of the method: `momentum`, `grown`.

    The keys up to `sparse_aware_init` are shared by a comparison: a method ignores those that have
    no meaning for it (`dense` has no sparsity, `static` no rewirings).

    Attributes:
      name: A name in `rigl_optax.training.methods.METHODS`.
      sparsity: Overall fraction of zeros in the sparse layers.
      distribution: How sparse each layer is.
      every: Steps between rewirings (Delta T).
      until: The fraction of the training steps after which rewiring ends (T_end).
      drop_fraction: Fraction of active weights replaced at the first rewiring.
      drop_schedule: How that fraction decays to the last rewiring: `cosine`, `linear`,
        `inverse_power` (cubic), all to 0; `stages`, halved after each third; or `constant`.
      prune_from: The fraction of the training steps after which gradual pruning begins.
      sparse_aware_init: Rescales initial weights to the inputs that the first masks leave: `none`;
        `unit`, each unit by its own number; or `layer`, all units of a layer alike. For networks
        without normalisation; not with `condensed`, `optimizer.base_width`, `start.path` or
        methods whose inactive weights go on learning.
      structure: Which weights are active or inactive together.
      condensed: Stores only the active blocks of sparse kernels, so that time and memory follow the
        density (`rigl_optax.condensed`): same masks and weights as without, up to rounding. For
        `static`, `set`, `mest` and `rigl` with blocks, on meshes with `mesh.params = 1`.
      ticket: Workdir of the finished run whose masks `lottery` methods start from; else empty.
      options: Arguments of the method.
    """

    name: str = _key("rigl")
    sparsity: float = _key(0.9, "[0, 1)")
    distribution: Distribution = dataclasses.field(default_factory=Distribution)
    every: int = _key(100, "[1, inf)")
    until: float = _key(0.75, "(0, 1]")
    drop_fraction: float = _key(0.3, "[0, 1]")
    drop_schedule: str = _key("cosine", one_of=_DROP_SCHEDULES)
    prune_from: float = _key(0.2, "[0, 1)")
    sparse_aware_init: str = _key("none", one_of=("none", "unit", "layer"))
    structure: Structure = dataclasses.field(default_factory=Structure)
    condensed: bool = _key(False)
    ticket: str = _key("")
    options: Mapping[str, Any] = _options()


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """The inner optimizer and its learning rate. Other keys are its arguments: `momentum`, `b2`.

    Attributes:
      name: Any optimizer of `optax` or `optax.contrib` that takes a learning rate: `sgd`, `adamw`;
        or `adamw_by_age`, `rigl_optax.adamw` with a step count per weight.
      learning_rate: The highest learning rate of the schedule.
      schedule: Of the learning rate: `cosine` to 0 at the last step, `constant`, or `step`.
      warmup: The fraction of the training steps in which the rate rises linearly from 0.
      decay_at: For `step`, else empty: fractions of the training steps, ascending.
      decay_factor: Multiplies the rate at each of them.
      base_width: For `gpt` and `vit`, sparse muPar: the width of the residual stream for which the
        rate was chosen. With f = base_width / (width * density), the density of a layer when the
        run starts, the rate of the kernels of attention and MLP is multiplied by f, and their
        initial values by sqrt(f). One rate then serves all widths and sparsities. 0 for neither.
      gradient_clip: The largest global norm of the gradient that the optimizer sees; 0 for any.
      weight_decay: Passed to optimizers that have it (`adamw`: decoupled); for others an L2 term,
        (weight_decay / 2) * |w|^2, whose gradient is added for the optimizer alone.
      weight_decay_on: Which parameters decay: `kernels`, those of two dimensions or more;
        `kernels_but_depthwise`; or `all`, biases and normalisation as well.
      options: Arguments of the optimizer.
    """

    name: str = _key("sgd")
    learning_rate: float = _key(0.1, "[0, inf)")
    schedule: str = _key("cosine", one_of=("constant", "cosine", "step"))
    warmup: float = _key(0.0, "[0, 1)")
    decay_at: tuple[float, ...] = _key((), "(0, 1)")
    decay_factor: float = _key(1.0, "(0, inf)")
    base_width: int = _key(0, "[0, inf)")
    gradient_clip: float = _key(0.0, "[0, inf)")
    weight_decay: float = _key(0.0, "[0, inf)")
    weight_decay_on: str = _key("kernels", one_of=("kernels", "kernels_but_depthwise", "all"))
    options: Mapping[str, Any] = _options()


@dataclasses.dataclass(frozen=True)
class Loss:
    """The training loss, a cross-entropy.

    Attributes:
      label_smoothing: The part of each label that is spread evenly over all classes.
    """

    label_smoothing: float = _key(0.0, "[0, 1)")


@dataclasses.dataclass(frozen=True)
class Mesh:
    """The devices.

    Attributes:
      data: Number of copies of the state; 0 for as many as fit (devices / `params`). The batch is
        spread over all devices of the mesh.
      params: Devices among which parameters, masks and optimizer state are cut up.
      axes: `auto` or `explicit`: whether shardings are a part of the types.
    """

    data: int = _key(0, "[0, inf)")
    params: int = _key(1, "[1, inf)")
    axes: str = _key("auto", one_of=("auto", "explicit"))


@dataclasses.dataclass(frozen=True)
class Log:
    """Records of the training loss.

    Attributes:
      every: Steps between records.
    """

    every: int = _key(100, "[1, inf)")


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Evaluations on the validation split.

    Attributes:
      every: Steps between evaluations.
      batch_size: Examples in an evaluation batch; of a text, lanes.
    """

    every: int = _key(1_000, "[1, inf)")
    batch_size: int = _key(500, "[1, inf)")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Checkpoints.

    Attributes:
      every: Steps between checkpoints; 0 for none but the last.
      keep: How many of the newest to keep, besides the best.
    """

    every: int = _key(1_000, "[0, inf)")
    keep: int = _key(2, "[1, inf)")


@dataclasses.dataclass(frozen=True)
class Faults:
    """What happens when something goes wrong.

    Attributes:
      on_nonfinite: When a loss, a gradient or a weight is not finite: `stop`; `skip` the step, at
        the cost of looking at all gradients at every step; or `rollback` to the last checkpoint,
        and from there skip such steps until past the place. 50 steps skipped in a row end the
        run, and so does a validation or test loss that is not finite.
      max_rollbacks: How often a run goes back before it ends with the error.
      compare_at_rewirings: Compare the masks and weights of all devices after every rewiring, not
        only before a checkpoint.
    """

    on_nonfinite: str = _key("stop", one_of=("stop", "skip", "rollback"))
    max_rollbacks: int = _key(10, "[0, inf)")
    compare_at_rewirings: bool = _key(False)


@dataclasses.dataclass(frozen=True)
class Config:
    """One training run.

    Attributes:
      steps: Training steps. Training M times as long is M times the steps: what is a fraction of
        them (`method.until`, `optimizer.warmup`, ...) scales, `method.every` does not.
      batch_size: Examples in a training batch; of a text, lanes that are read side by side.
      seed: Seeds initial weights, masks and the order of the data.
      data: The dataset.
      model: The network.
      start: Trained weights from which it begins.
      method: How it is made sparse.
      optimizer: The inner optimizer.
      loss: The training loss.
      mesh: The devices.
      log: Records of the training loss.
      eval: Evaluations.
      checkpoint: Checkpoints.
      faults: What happens when something goes wrong.
    """

    steps: int = _key(2_000, "[1, inf)")
    batch_size: int = _key(100, "[1, inf)")
    seed: int = _key(0, "[0, inf)")
    data: Data = dataclasses.field(default_factory=Data)
    model: Model = dataclasses.field(default_factory=Model)
    start: Start = dataclasses.field(default_factory=Start)
    method: Method = dataclasses.field(default_factory=Method)
    optimizer: Optimizer = dataclasses.field(default_factory=Optimizer)
    loss: Loss = dataclasses.field(default_factory=Loss)
    mesh: Mesh = dataclasses.field(default_factory=Mesh)
    log: Log = dataclasses.field(default_factory=Log)
    eval: Evaluation = dataclasses.field(default_factory=Evaluation)
    checkpoint: Checkpoint = dataclasses.field(default_factory=Checkpoint)
    faults: Faults = dataclasses.field(default_factory=Faults)

    @property
    def rewire_end(self) -> int:
        """The step from which on nothing is rewired (T_end)."""
        return max(1, round(self.method.until * self.steps))

    def step_at(self, fraction: float) -> int:
        """The step that lies after this fraction of the run."""
        return round(fraction * self.steps)


_SECTIONS: dict[str, type] = {
    "data": Data,
    "model": Model,
    "start": Start,
    "method": Method,
    "method.distribution": Distribution,
    "method.structure": Structure,
    "optimizer": Optimizer,
    "loss": Loss,
    "mesh": Mesh,
    "log": Log,
    "eval": Evaluation,
    "checkpoint": Checkpoint,
    "faults": Faults,
}

# What a field of each type may be read from; a bool is no integer.
_KINDS: dict[Any, tuple[type, ...]] = {
    str: (str,),
    str | int: (str, int),
    bool: (bool,),
    int: (int,),
    float: (float, int),
    tuple[int, ...]: (tuple, list),
    tuple[float, ...]: (tuple, list),
    tuple[str, ...]: (tuple, list),
}
_ITEMS = {tuple[int, ...]: int, tuple[float, ...]: float, tuple[str, ...]: str}


def sections() -> list[str]:
    """Returns the dotted names of all sections, each after the one that it is in."""
    return list(_SECTIONS)


def known_keys() -> list[str]:
    """All keys of a config with their sections, as `method.sparsity`, in alphabetical order."""
    return sorted(_known(Config, ""))


def from_mapping(values: Mapping[str, Any]) -> Config:
    """Makes a checked `Config` from a nested mapping: a `ConfigDict` as a dict, or JSON.

    Args:
      values: Nested dicts. Keys that are left out have their defaults.

    Raises:
      ValueError: If a key is unknown (it names the nearest known one), or a value makes no sense.
    """
    config = _read(Config, values, "")
    _check(config)
    return config


def changed(config: Config, changes: Mapping[str, Any]) -> Config:
    """Returns the config with other values of some keys, checked again.

    Options belong to what a section names: another name begins without any.

    Args:
      config: What they are changed in.
      changes: By their dotted names: `{"method.name": "static", "steps": 5}`.
    """
    values = to_json(config)
    for key in sorted(changes, key=lambda key: not key.endswith(".name")):
        *sections, last = key.split(".")
        inner = values
        for section in sections:
            inner = inner.setdefault(section, {})
        if last == "name" and inner.get("name") != changes[key]:
            listed = {field.name for field in dataclasses.fields(_SECTIONS[".".join(sections)])}
            for option in set(inner) - listed:
                del inner[option]
        inner[last] = _plain(changes[key])
    return from_mapping(values)


def to_json(config: Any) -> dict[str, Any]:
    """Returns the config as nested dicts that JSON can hold; `from_mapping` reads it back."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.metadata.get("open"):
            values |= _plain(value)
        else:
            values[field.name] = _plain(value)
    return values


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns nested dicts as one dict of dotted names; structures and options stay whole."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        name = prefix + key
        if name in _SECTIONS and isinstance(value, Mapping):
            found |= flat(value, name + ".")
        else:
            found[name] = value
    return found


def differences(saved: Mapping[str, Any], config: Config) -> list[str]:
    """Lists the keys that change the numbers and differ, as `key: saved -> now`.

    The lanes of an evaluation change those of a text, since each begins without a state; and
    `data.dir` does where the dataset is whatever it holds.
    """
    before, now = flat(to_json(from_mapping(saved))), flat(to_json(config))
    free = set(BOOKKEEPING)
    if config.data.sequence_length:
        free.remove("eval.batch_size")
    if config.data.name in FROM_FOLDER:
        free.remove("data.dir")
    return [
        f"{key}: {before.get(key, 'absent')!r} -> {now.get(key, 'absent')!r}"
        for key in sorted((set(before) | set(now)) - free)
        if before.get(key, "absent") != now.get(key, "absent")
    ]


def check_options(section: str, name: str, given: Iterable[str], allowed: Iterable[str]) -> None:
    """Raises a ValueError if an open section has a key that nothing takes.

    Args:
      section: As `model`.
      name: What the section names, whose arguments they are.
      given: Keys that the section does not list.
      allowed: Arguments there are.
    """
    allowed = list(allowed)
    for key in sorted(set(given) - set(allowed)):
        known = [f.name for f in dataclasses.fields(_SECTIONS[section]) if f.name != "options"]
        raise ValueError(
            f"config.{section}.{key}: there is no such key{_nearest(key, [*known, *allowed])}; "
            f"keys of config.{section} are {', '.join(known)}, and for {name!r} "
            f"{', '.join(sorted(allowed)) or 'none more'}"
        )


def pairs(value: Any, key: str) -> dict[str, Any]:
    """Reads pairs of a pattern and a value, or a dict of them.

    Patterns may have dots, which the keys of a `ConfigDict` may not: so recipes give pairs.

    Raises:
      ValueError: If it is neither.
    """
    if isinstance(value, Mapping):
        return dict(value)
    is_pairs = isinstance(value, tuple | list) and all(
        isinstance(pair, tuple | list) and len(pair) == 2 and isinstance(pair[0], str)
        for pair in value
    )
    if not is_pairs:
        raise ValueError(
            f"config.{key}={value!r}: must be pairs of a pattern and a value, as "
            "(('layers/0', ...),)"
        )
    return dict(value)


def _read(kind: Any, values: Any, section: str) -> Any:
    """A section from its mapping; sections in it likewise."""
    if not isinstance(values, Mapping):
        raise ValueError(f"config.{section}={values!r}: must be a section with keys, not a value")
    fields = {f.name: f for f in dataclasses.fields(kind)}
    is_open = "options" in fields and fields["options"].metadata.get("open")
    known = [name for name in fields if not (is_open and name == "options")]
    found: dict[str, Any] = {}
    options: dict[str, Any] = {}
    prefix = f"{section}." if section else ""
    for key, value in values.items():
        if key not in known:
            if is_open:
                options[key] = value
                continue
            near = _elsewhere(key) or _nearest(key, known) or _nearest(key, known_keys())
            raise ValueError(
                f"config.{prefix}{key}: there is no such key{near}; keys of config"
                f"{'.' + section if section else ''} are {', '.join(known)}"
            )
        if prefix + key in _SECTIONS:
            found[key] = _read(_SECTIONS[prefix + key], value, prefix + key)
        elif key == "layers" and kind is Structure:
            each = pairs(value, prefix + key)
            found[key] = tuple((p, _read(Structure, s, prefix + key)) for p, s in each.items())
        elif key == "names" and kind is Start:
            each = pairs(value, prefix + key)
            found[key] = tuple(
                (p, _value(fields["path"], n, prefix + key)) for p, n in each.items()
            )
        else:
            found[key] = _value(fields[key], value, prefix + key)
    if is_open:
        found["options"] = options
    return kind(**found)


def _value(field: Any, value: Any, name: str) -> Any:
    """A value of the field's type and within its bounds."""
    allowed = _KINDS[field.type]
    if tuple in allowed and type(value) in _KINDS[_ITEMS[field.type]]:
        value = (value,)  # `--config.model.hidden=300` on a command line
    if type(value) not in allowed:
        kinds = " or ".join(kind.__name__ for kind in allowed)
        raise ValueError(f"config.{name}={value!r}: must be {kinds}")
    if tuple in allowed:
        item = _ITEMS[field.type]
        value = tuple(value)
        if not all(type(x) in _KINDS[item] for x in value):
            raise ValueError(f"config.{name}={value!r}: must be {item.__name__}s")
    for number in value if isinstance(value, tuple) else (value,):
        _check_range(number, value, field.metadata["range"], name)
    one_of = field.metadata["one_of"]
    if one_of and value not in one_of:
        raise ValueError(f"config.{name}={value!r}: must be one of {', '.join(one_of)}")
    return value


def _check_range(number: Any, value: Any, allowed: str, name: str) -> None:
    """Raises a ValueError if a number is outside a range like `[0, 1)`, or too large."""
    if isinstance(number, float) and not math.isfinite(number):
        raise ValueError(f"config.{name}={value}: must be finite")
    if isinstance(number, int) and abs(number) >= _MOST:
        raise ValueError(f"config.{name}={value}: must be below 2**31")
    if not allowed:
        return
    low, high = (float(bound) for bound in allowed[1:-1].split(","))
    is_low = number < low or (allowed[0] == "(" and number == low)
    is_high = number > high or (allowed[-1] == ")" and number == high)
    if is_low or is_high:
        each = " each" if isinstance(value, tuple) else ""
        wanted = f"in {allowed}" if high < math.inf else f"at least {low:g}"
        if allowed == "(0, inf)":
            wanted = "positive"
        raise ValueError(f"config.{name}={value}: must be {wanted}{each}")


def _check(config: Config) -> None:
    """Raises a ValueError if two values contradict each other."""
    data, optimizer = config.data, config.optimizer
    if not config.start.path and config.start != Start():
        plain = to_json(Start())
        given = {k: v for k, v in to_json(config.start).items() if v != plain[k]}
        raise ValueError(
            f"config.start.path='': must be given with the other keys of config.start: {given}"
        )
    if data.validation and data.name not in PHOTOS and not data.name.startswith(TFDS):
        raise ValueError(
            f"config.data.validation={data.validation}: must be 0 for {data.name}, whose splits "
            f"are given; it is for {', '.join(PHOTOS)}, {TFDS}NAME"
        )
    step = str(config.start.step)
    if step not in ("newest", "best") and not step.isdecimal():
        raise ValueError(
            f"config.start.step={config.start.step!r}: must be 'newest', 'best' or the step of a "
            "checkpoint"
        )
    for pattern in (*config.start.keep, *(pattern for pattern, _ in config.start.names)):
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(
                f"config.start: {pattern!r} is no regular expression: {error}"
            ) from None
    rescaled = config.method.sparse_aware_init
    for key, value in (
        ("start.path", config.start.path),
        ("method.condensed", config.method.condensed),
        ("optimizer.base_width", optimizer.base_width),
    ):
        if rescaled != "none" and value:
            raise ValueError(
                f"config.method.sparse_aware_init={rescaled!r}: must be 'none' with "
                f"config.{key}={value!r}"
            )
    if (optimizer.schedule == "step") != bool(optimizer.decay_at):
        raise ValueError(
            f"config.optimizer.decay_at={optimizer.decay_at}: must be given for schedule='step' "
            f"alone, and this is {optimizer.schedule!r}"
        )
    inside = [optimizer.warmup, *optimizer.decay_at, 1.0]
    if any(early >= late for early, late in itertools.pairwise(inside)):
        raise ValueError(
            f"config.optimizer.decay_at={optimizer.decay_at}: must be ascending fractions of the "
            f"run, after the warmup of {optimizer.warmup} and before 1"
        )


def _known(kind: Any, prefix: str) -> list[str]:
    found = []
    for field in dataclasses.fields(kind):
        name = prefix + field.name
        if name in _SECTIONS:
            found += _known(_SECTIONS[name], name + ".")
        elif not field.metadata.get("open"):
            found.append(name)
    return found


def _nearest(key: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(key, list(known), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def _elsewhere(key: str) -> str:
    """The same key in another section."""
    for name in known_keys():
        if name.rpartition(".")[2] == key:
            return f" (did you mean 'config.{name}'?)"
    return ""


def _plain(value: Any) -> Any:
    """Dicts and lists in place of sections, mappings and tuples."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return to_json(value)
    if isinstance(value, Mapping):
        return {key: _plain(x) for key, x in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(x) for x in value]
    return value
