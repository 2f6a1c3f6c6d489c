"""The keys a config has, checked once before anything runs."""

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
    }
)


@dataclasses.dataclass(frozen=True)
class Config:
    """One training run. Config files list all keys; there are no defaults.

    Attributes:
      dataset: `digits` or `fashion_mnist`.
      data_dir: Where the dataset is; empty for its usual place.
      model: `lenet`.
      hidden: Widths of the hidden layers.
      method: A name in `rigl_optax.training.methods.METHODS`.
      sparsity: Overall fraction of zeros in the sparse layers; `dense` ignores it.
      distribution: `erk`, `erdos_renyi` or `uniform`.
      rewire_every: Steps between rewirings (Delta T).
      rewire_until: The fraction of the training steps after which rewiring ends (T_end).
      drop_fraction: Fraction of active weights replaced at the first rewiring; cosine to 0.
      steps: Training steps.
      batch_size: Examples in a training batch.
      learning_rate: At the first step; cosine to 0 at the last.
      momentum: Of SGD with Nesterov momentum.
      weight_decay: L2 on the kernels, as in the loss term (weight_decay / 2) * |w|^2.
      seed: For initial weights, masks and the order of the data.
      log_every: Steps between records of the training loss.
      eval_every: Steps between evaluations on the validation split.
      eval_batch_size: Examples in an evaluation batch.
      checkpoint_every: Steps between checkpoints; 0 for none but the last.
      keep_checkpoints: How many of the newest to keep.
    """

    dataset: str
    data_dir: str
    model: str
    hidden: tuple[int, ...]
    method: str
    sparsity: float
    distribution: str
    rewire_every: int
    rewire_until: float
    drop_fraction: float
    steps: int
    batch_size: int
    learning_rate: float
    momentum: float
    weight_decay: float
    seed: int
    log_every: int
    eval_every: int
    eval_batch_size: int
    checkpoint_every: int
    keep_checkpoints: int

    def __post_init__(self) -> None:
        lowest = {
            "steps": 1,
            "log_every": 1,
            "eval_every": 1,
            "eval_batch_size": 1,
            "keep_checkpoints": 1,
            "checkpoint_every": 0,
            "seed": 0,
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
    fields = dict(values)
    fields["hidden"] = tuple(int(width) for width in fields["hidden"])
    return Config(**fields)


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
