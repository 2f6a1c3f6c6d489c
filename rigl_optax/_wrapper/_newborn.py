"""Where newborn weights start: their values, and their optimizer state."""

import functools
from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

from rigl_optax._ranking import _random
from rigl_optax._types import Arrays, Seed
from rigl_optax._wrapper._method import GrownState, RewiringInputs
from rigl_optax._xla import _sharding

Value = Literal["zeros", "normal", "uniform", "initial", "gradient", "gradient_sign"]
OptimizerState = Literal["rest", "mean_second_moment"]


class Grown(NamedTuple):
    r"""What new weights start from; the default is the paper's: 0, and an optimizer at rest.

    Attributes:
      value: `zeros`; `normal`, $N(0, 1)$; `uniform` in (-1, 1); `initial`, a random
        permutation of the layer's weights at init; `gradient` or `gradient_sign`, of the
        dense gradient (or of what the method remembers of it). The reference code calls them
        `zeros`, `random_normal`, `random_uniform`, `initial_dist`, `grad_scale`, `grad_sign`.
      divisor: What the value is divided by (the number at the end of the reference's names).
      gradient_scale: Every slot of the optimizer starts at this times the dense gradient
        (`initial_acc_scale` in the reference code).
      optimizer_state: `rest`; or `mean_second_moment`: averages of squared gradients (`nu` of
        Adam and its relatives, Adagrad's sum) start at their layer's mean over the weights that
        stay active. From rest, under Adam's bias correction late in training, a new weight
        moves by several times the learning rate.

    Any value but `zeros` costs an array of the size of the weights on every call, since it
    has to come out of the rewiring.
    """

    value: Value = "zeros"
    divisor: float = 1.0
    gradient_scale: float = 0.0
    optimizer_state: OptimizerState = "rest"

    def check(self) -> None:
        """Raises a ValueError on a name that does not exist, or a divisor that is not above 0."""
        for name, kinds in (("value", Value), ("optimizer_state", OptimizerState)):
            if getattr(self, name) not in get_args(kinds):
                raise ValueError(
                    f"grown.{name}={getattr(self, name)!r}: must be one of "
                    f"{', '.join(get_args(kinds))}"
                )
        if not self.divisor > 0:
            raise ValueError(f"grown.divisor={self.divisor}: must be above 0")

    @property
    def state(self) -> GrownState | None:
        """Returns `Method.grown_state`."""
        from_mean = self.optimizer_state == "mean_second_moment"
        if not self.gradient_scale and not from_mean:
            return None
        return GrownState(self.gradient_scale, from_mean)

    def values(self, seed: Seed) -> Callable[[RewiringInputs, Arrays], Arrays] | None:
        """Makes `Method.grown_values`."""
        return None if self.value == "zeros" else functools.partial(_values, self, seed)


AT_REST = Grown()


def _values(grown: Grown, seed: Seed, inputs: RewiringInputs, initial: Arrays) -> Arrays:
    """Computes values for all entries, laid out as the inputs."""
    divisor = jnp.float32(grown.divisor)
    if grown.value == "gradient":
        return [g / divisor for g in inputs.gradients]
    if grown.value == "gradient_sign":
        return [jnp.sign(g) / divisor for g in inputs.gradients]
    positions = [leaf.position for leaf in inputs.leaves]
    scores = _random.random_scores(
        seed, _random.Purpose.GROWN_VALUE, positions, inputs.packing, inputs.count
    )
    if grown.value == "initial":
        layers = inputs.packing.rankings_per_leaf
        each = zip(initial, inputs.packing.unpack(scores), layers, strict=True)
        shuffled = [_shuffled(x.astype(jnp.float32), s, n) for x, s, n in each]
        return inputs.packing.pack([x / divisor for x in shuffled], 0.0)
    draw = _random.normal if grown.value == "normal" else _random.symmetric
    return [draw(s) / divisor for s in scores]


def _shuffled(leaf: jax.Array, scores: jax.Array, layers: int) -> jax.Array:
    """Puts the entries of each layer in the order of their scores."""
    # Weights change places between devices: this one option gathers them (docs/scale.md).
    leaf, scores = _sharding.whole(leaf), _sharding.whole(scores)
    order = jnp.argsort(scores.reshape(layers, -1), axis=1)
    return jnp.take_along_axis(leaf.reshape(layers, -1), order, axis=1).reshape(leaf.shape)
