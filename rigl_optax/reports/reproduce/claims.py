"""Declares the claims: what the paper says, and the runs that show whether it holds here."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from rigl_optax.reports import summary
from rigl_optax.reports.comparison import Arm
from rigl_optax.training import config as config_lib

Rates = tuple[float, ...]


def _itself(arm: Arm) -> Arm:
    return arm


def _static(arm: Arm) -> tuple[str, str]:
    return summary.BASELINE, ""


@dataclasses.dataclass(frozen=True, eq=False)
class Experiment:
    """Arms on one task, over several seeds.

    Attributes:
      task: Its short name, and that of the folder of its records.
      title: For people.
      config: Nested dicts: what differs from the defaults of a config.
      arms: What is compared.
      rates: Learning rates tried for each arm; the best on validation data is used.
      seeds: Runs of each arm, from seed 0.
      tuning_seeds: Runs of each arm at each rate, from seed `TUNING_SEED`; not in the tables.
      tuned_as: `tuned_as(arm)` returns the arm whose rate an arm takes: itself, or one that stands
        for it.
      baseline: As in `summary.summary`: what each arm is compared with, seed by seed.
    """

    task: str
    title: str
    config: Mapping[str, Any]
    arms: tuple[Arm, ...]
    rates: Rates
    seeds: int = 5
    tuning_seeds: int = 1
    tuned_as: Callable[[Arm], Arm] = _itself
    baseline: summary.Baseline = _static

    @property
    def base(self) -> config_lib.Config:
        """The config of all arms; method, sparsity, seed and rate are replaced."""
        return config_lib.from_mapping(self.config)

    def quick(self) -> "Experiment":
        """Returns a cut that takes seconds: few steps, one seed, two rates, the sparsest arms."""
        sparsest = max(
            (arm.sparsity for arm in self.arms if arm.sparsity is not None), default=None
        )
        arms = tuple(
            arm._replace(steps=None if arm.steps is None else 2 * _QUICK["steps"])
            for arm in self.arms
            if arm.sparsity == sparsest
        )[:3]
        found = config_lib.changed(self.base, {"method.every": 10, **_QUICK})
        return dataclasses.replace(
            self,
            config=config_lib.to_json(found),
            arms=arms,
            rates=self.rates[:2],
            seeds=1,
            tuning_seeds=1,
        )


_QUICK = {"steps": 40, "log.every": 40, "eval.every": 40}
TUNING_SEED = 100


@dataclasses.dataclass(frozen=True)
class Claim:
    """A claim of the paper.

    Attributes:
      name: On the command line.
      title: One line.
      paper: What the paper says: numbers, with the section, table or figure.
      experiments: The runs here, a task each.
    """

    name: str
    title: str
    paper: str
    experiments: tuple[Experiment, ...]


def _task(data: str, steps: int, every: int) -> Mapping[str, Any]:
    """LeNet-300-100 on images whose pixels are standardised; as the recipes otherwise."""
    return MappingProxyType(
        {
            "steps": steps,
            "batch_size": 100,
            "data": {"name": data, "standardise": True},
            "model": {"name": "lenet", "hidden": (300, 100)},
            "method": {"name": "rigl", "every": every},
            "optimizer": {"momentum": 0.9, "nesterov": True, "weight_decay": 1e-4},
            "mesh": {"data": 1},
            "log": {"every": 500},
            "eval": {"every": steps // 4, "batch_size": 1_000},
            "checkpoint": {"every": 0},
        }
    )


DIGITS = _task("digits", 2_000, 50)
FASHION = _task("fashion_mnist", 4_400, 100)
DIGITS_TITLE = "LeNet-300-100 on scikit-learn's digits, 2,000 steps"
FASHION_TITLE = "LeNet-300-100 on Fashion-MNIST, 4,400 steps"


def _at(methods: Sequence[str], sparsities: Sequence[float]) -> tuple[Arm, ...]:
    return tuple(Arm(method, part) for part in sparsities for method in methods)


def _small_dense(sparsities: Sequence[float]) -> tuple[Arm, ...]:
    """Dense networks of as many weights, and FLOPs, as the sparse ones: masks take nothing."""
    none = (("method.mask_bits", 0),)
    return tuple(Arm("small_dense", part, changes=none) for part in sparsities)


_METHODS = Claim(
    "methods",
    "RigL, SET, static masks and a small dense network, at equal sparsity",
    "ResNet-50 on ImageNet, uniform sparsity, 80 / 90 %: static 70.6 / 65.8, small dense "
    "72.1 / 68.9, SET 72.9 / 69.6, RigL 74.6 / 72.0, pruning 75.6 / 73.9 (quoted there), dense "
    "76.8 (figure 2); at 95 / 96.5 %: static 59.5 / 55.4, SET 64.4 / 60.8, RigL 67.5 / 65.0 "
    "(appendix L, table 4).",
    (
        Experiment(
            "digits",
            DIGITS_TITLE,
            DIGITS,
            (
                Arm("dense", None),
                *_small_dense((0.8, 0.9, 0.95, 0.98, 0.99, 0.995)),
                *_at(("static", "set", "rigl", "gmp"), (0.8, 0.9, 0.95, 0.98, 0.99, 0.995)),
            ),
            rates=(0.05, 0.1, 0.2),
        ),
        Experiment(
            "fashion_mnist",
            FASHION_TITLE,
            FASHION,
            (
                Arm("dense", None),
                *_small_dense((0.98, 0.99, 0.995)),
                *_at(("static", "set", "rigl"), (0.98, 0.99, 0.995)),
            ),
            rates=(0.1, 0.2),
            seeds=3,
        ),
    ),
)


def _distributions() -> tuple[Arm, ...]:
    kinds = (("ERK", "erk"), ("ER", "erdos_renyi"), ("uniform", "uniform"))
    return tuple(
        Arm(method, part, name=name, changes=(("method.distribution.name", kind),))
        for part in (0.9, 0.98)
        for method in ("static", "rigl")
        for name, kind in kinds
    )


_DISTRIBUTIONS = Claim(
    "distributions",
    "How sparsity is spread over the layers",
    "ERK is better than ER and uniform at every sparsity, by more the sparser the network, for all "
    "four methods, at about twice the FLOPs of uniform (section 4.4, figure 5, left). ResNet-50, "
    "RigL, 80 / 90 %: ERK 75.1 / 73.0 at 0.42 / 0.25 of the dense training FLOPs, uniform 74.6 / "
    "72.0 at 0.23 / 0.13 (figure 2).",
    (
        Experiment(
            "digits",
            DIGITS_TITLE,
            DIGITS,
            _distributions(),
            rates=(0.05, 0.1, 0.2),
            baseline=lambda arm: (arm.method, "uniform"),
        ),
    ),
)


def _rigl(part: float, name: str, **changes: Any) -> Arm:
    keys = tuple((key.replace("__", "."), value) for key, value in changes.items())
    return Arm("rigl", part, name=name, changes=keys)


def _schedules(part: float) -> tuple[Arm, ...]:
    """The paper's setting (scaled to 2,000 steps), a grid, and other schedules and ends."""
    grid = tuple(
        _rigl(part, f"every {every}, {alpha:g}", method__every=every, method__drop_fraction=alpha)
        for every in (25, 50, 100, 200)
        for alpha in (0.1, 0.3, 0.5)
        if (every, alpha) != (50, 0.3)
    )
    schedules = tuple(
        _rigl(part, kind.replace("_", " "), method__drop_schedule=kind)
        for kind in ("constant", "linear", "inverse_power")
    )
    ends = tuple(_rigl(part, f"until {end:g}", method__until=end) for end in (0.5, 1.0))
    return (Arm("rigl", part), *grid, *schedules, *ends)


_SCHEDULE = Claim(
    "schedule",
    "How often, how much and how long is rewired",
    "Of Delta T 50, 100, 500, 1,000 and alpha 0.1, 0.3, 0.5 on ResNet-50, Delta T 100 with 0.3 or "
    "0.5 is best, and 1,000 still reaches more than 73.5 (section 4.4, figure 5, right). The "
    "drop fraction falls as a cosine; ending at about 3/4 of training helps slightly on images.",
    (
        Experiment(
            "digits",
            DIGITS_TITLE + "; not named: every 50 steps, alpha 0.3, cosine, until 0.75",
            DIGITS,
            _schedules(0.98),
            rates=(0.05, 0.1, 0.2),
            tuned_as=lambda arm: Arm("rigl", arm.sparsity),
            baseline=lambda arm: ("rigl", ""),
        ),
    ),
)


def _growth(part: float) -> tuple[Arm, ...]:
    def grown(name: str, value: str, divisor: float) -> Arm:
        start = (("value", value), ("divisor", divisor))
        keys = tuple((f"method.grown.{key}", found) for key, found in start)
        return Arm("rigl", part, name=name, changes=keys)

    return (
        Arm("rigl", part),
        Arm("snfs", part),
        Arm("set", part),
        _rigl(part, "1 candidate", method__candidates=1.0),
        _rigl(part, "average of 50", method__accumulate=50),
        grown("initial", "initial", 1.0),
        grown("normal / 10", "normal", 10.0),
        grown("gradient", "gradient", 1.0),
        _rigl(part, "gradient step", method__gradient_step=True),
    )


_GROWTH = Claim(
    "growth",
    "By what weights grow, and from which value",
    "ResNet-50, 80 % uniform: growth by the gradient (RigL) 74.6, at random (SET) 72.9 (figure 2); "
    "by momentum (SNFS) about 74.4, read off the same figure, at more FLOPs. New weights start at "
    "0, which leaves the network's outputs as they were (section 3).",
    (
        Experiment(
            "digits",
            DIGITS_TITLE,
            DIGITS,
            _growth(0.98),
            rates=(0.05, 0.1, 0.2),
            tuned_as=lambda arm: Arm(arm.method, arm.sparsity),
            baseline=lambda arm: ("rigl", ""),
        ),
    ),
)


_LOTTERY = Claim(
    "lottery",
    "RigL's final masks as lottery tickets",
    "ResNet-50, 80 % uniform: RigL's final masks on the initial weights reach 70.8 trained with "
    "static masks and 73.9 with RigL; random masks with RigL 74.6, and 76.1 with twice the steps, "
    "which cost as much as the ticket and its run (appendix E, table 3).",
    (
        Experiment(
            "digits",
            DIGITS_TITLE,
            DIGITS,
            tuple(
                arm
                for part in (0.95, 0.98)
                for arm in (
                    Arm("rigl", part),
                    Arm("static", part),
                    Arm("lottery", part),
                    Arm("lottery_rigl", part),
                    Arm("rigl", part, steps=4_000),
                )
            ),
            rates=(0.05, 0.1, 0.2),
            tuned_as=lambda arm: Arm("static" if arm.method == "static" else "rigl", arm.sparsity),
            baseline=lambda arm: ("rigl", ""),
        ),
    ),
)

_LONGER = Claim(
    "longer",
    "Longer training: RigL against pruning",
    "ResNet-50, 80 / 90 % uniform: RigL 74.6 / 72.0, trained 5 times as long 76.6 / 75.7; pruning "
    "75.6 / 73.9 (quoted there), and 76.5 / 75.2 after 1.5 times the training (figure 2).",
    (
        Experiment(
            "digits",
            DIGITS_TITLE + " unless named",
            DIGITS,
            tuple(
                Arm(method, part, steps=steps)
                for part in (0.98, 0.99)
                for steps in (None, 4_000, 10_000)
                for method in ("rigl", "gmp")
            ),
            rates=(0.05, 0.1, 0.2),
            tuned_as=lambda arm: Arm(arm.method, arm.sparsity),
            baseline=lambda arm: ("gmp", ""),
        ),
    ),
)


def _batches(part: float) -> tuple[Arm, ...]:
    """As many examples and rewirings in batches of each size; growth by one, or an average of 5."""
    found = []
    for batch, steps, every in (
        (100, None, 50),
        (50, 4_000, 100),
        (200, 1_000, 25),
        (500, 400, 10),
    ):
        own = () if steps is None else (("batch_size", batch), ("method.every", every))
        names = (
            ("", "average of 5") if steps is None else (f"of {batch}", f"of {batch}, average of 5")
        )
        one = Arm("rigl", part, steps=steps, name=names[0], changes=own)
        more = (*own, ("method.accumulate", 5))
        found += [one, one._replace(name=names[1], changes=more)]
    return tuple(found)


def _without_average(arm: Arm) -> Arm:
    """The arm of the same batches that grows by the gradient of one."""
    changes = tuple(pair for pair in arm.changes if pair[0] != "method.accumulate")
    return arm._replace(name=arm.name.removesuffix("average of 5").rstrip(", "), changes=changes)


_BATCHES = Claim(
    "batches",
    "Batches of other sizes, and growth by the average of several",
    "It has no such study, only the remark that a batch of 4,096 may be why momentum is not needed "
    "to choose what grows. Liu et al. (2021, arXiv 2102.02887) find that small batches, which take "
    "more steps, and long intervals help, as more weights are tried.",
    (
        Experiment(
            "digits",
            DIGITS_TITLE + " of 100 unless named, always 200,000 examples and 30 rewirings",
            DIGITS,
            _batches(0.98),
            rates=(0.05, 0.1, 0.2),
            tuned_as=_without_average,
            baseline=lambda arm: ("rigl", ""),
        ),
    ),
)

CLAIMS = {
    claim.name: claim
    for claim in (_METHODS, _LONGER, _DISTRIBUTIONS, _SCHEDULE, _BATCHES, _GROWTH, _LOTTERY)
}


def find(name: str) -> Claim:
    """Returns the claim of a name.

    Raises:
      ValueError: If there is none; it lists those there are.
    """
    if name not in CLAIMS:
        raise ValueError(f"{name!r}: claims are {', '.join(CLAIMS)}")
    return CLAIMS[name]
