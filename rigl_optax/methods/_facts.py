"""The facts of each method, by its short name: the one table that everything else is read from.

What its steps cost (`accounting.METHODS`), what `explain` builds, what the training loop watches
over and how figures group methods follow from it.
"""

import functools
from collections.abc import Callable
from typing import Literal, NamedTuple, TypeAlias

import optax

from rigl_optax.methods.alternating import acdc
from rigl_optax.methods.cannistraci_hebb import cht
from rigl_optax.methods.deep_rewiring import deep_rewiring
from rigl_optax.methods.dense_finetuning import spdf
from rigl_optax.methods.evolutionary import sparse_evolutionary_training
from rigl_optax.methods.hard_thresholding import iterative_hard_thresholding
from rigl_optax.methods.mest import mest
from rigl_optax.methods.momentum import sparse_momentum
from rigl_optax.methods.pruning import gradual_magnitude_pruning, granet
from rigl_optax.methods.reparameterization import dynamic_sparse_reparameterization
from rigl_optax.methods.rigl import rigl
from rigl_optax.methods.shadow import dnw, top_kast
from rigl_optax.methods.soft_threshold import soft_thresholding
from rigl_optax.methods.static import static_sparse

# When gradients of inactive weights matter; "wider set": of some of them, at every step.
DenseGradients: TypeAlias = Literal["never", "rewirings", "every step", "wider set"]

Kind: TypeAlias = Literal[
    "dense",
    "mask chosen before training",
    "rewired, sparse throughout",
    "rewired or masked by dense gradients",
    "from dense to sparse",
]


class Facts(NamedTuple):
    """What is true of a method, whatever it trains.

    Attributes:
      transform: `transform(inner, sparsity, ...) -> optax transformation`; None where nothing is
        sparse.
      kind: For figures of many methods.
      dense_gradients: When gradients of inactive weights matter.
      grows_by_gradient: Whether they decide on what grows.
      keeps_counts: Whether the number of active weights of a layer never changes.
      initial_gradients: What finding the first masks costs, in gradients of one dense batch.
    """

    transform: Callable[..., optax.GradientTransformation] | None
    kind: Kind
    dense_gradients: DenseGradients = "never"
    grows_by_gradient: bool = False
    keeps_counts: bool = True
    initial_gradients: float = 0.0


_DENSE: Kind = "dense"
_CHOSEN_BEFORE: Kind = "mask chosen before training"
_REWIRED: Kind = "rewired, sparse throughout"
_BY_DENSE_GRADIENTS: Kind = "rewired or masked by dense gradients"
_FROM_DENSE: Kind = "from dense to sparse"

METHODS: dict[str, Facts] = {
    "dense": Facts(None, _DENSE),
    "small_dense": Facts(None, _DENSE),
    "static": Facts(static_sparse, _CHOSEN_BEFORE),
    "snip": Facts(static_sparse, _CHOSEN_BEFORE, initial_gradients=1.0),
    # A gradient, and its derivative along it: two more.
    "grasp": Facts(static_sparse, _CHOSEN_BEFORE, initial_gradients=3.0),
    # A hundred gradients of one example each: about a batch.
    "synflow": Facts(static_sparse, _CHOSEN_BEFORE, initial_gradients=1.0),
    "set": Facts(sparse_evolutionary_training, _REWIRED),
    "mest": Facts(mest, _REWIRED),
    "mest_soft": Facts(functools.partial(mest, soft=True), _REWIRED, keeps_counts=False),
    "cht": Facts(cht, _REWIRED),
    "cht_soft": Facts(functools.partial(cht, soft=True), _REWIRED),
    "deepr": Facts(deep_rewiring, _REWIRED),
    "snfs": Facts(sparse_momentum, _BY_DENSE_GRADIENTS, "every step", grows_by_gradient=True),
    "snfs_redistribute": Facts(
        functools.partial(sparse_momentum, redistribute=True),
        _BY_DENSE_GRADIENTS,
        "every step",
        grows_by_gradient=True,
        keeps_counts=False,
    ),
    "dsr": Facts(dynamic_sparse_reparameterization, _REWIRED, keeps_counts=False),
    "rigl": Facts(rigl, _REWIRED, "rewirings", grows_by_gradient=True),
    "rigl_itop": Facts(rigl, _REWIRED, "rewirings", grows_by_gradient=True),
    "gmp": Facts(gradual_magnitude_pruning, _FROM_DENSE, keeps_counts=False),
    "gmp_global": Facts(
        functools.partial(gradual_magnitude_pruning, scope="global"),
        _FROM_DENSE,
        keeps_counts=False,
    ),
    "gmp_25_75": Facts(gradual_magnitude_pruning, _FROM_DENSE, keeps_counts=False),
    "granet": Facts(granet, _FROM_DENSE, "rewirings", grows_by_gradient=True, keeps_counts=False),
    "acdc": Facts(acdc, _FROM_DENSE, keeps_counts=False),
    "spdf": Facts(spdf, _CHOSEN_BEFORE, keeps_counts=False),
    # All weights take every step.
    "iht": Facts(iterative_hard_thresholding, _FROM_DENSE, "every step", keeps_counts=False),
    "top_kast": Facts(top_kast, _BY_DENSE_GRADIENTS, "wider set"),
    "dnw": Facts(dnw, _BY_DENSE_GRADIENTS, "every step"),  # all shadow weights learn
    "str": Facts(soft_thresholding, _FROM_DENSE, keeps_counts=False),
    "lottery": Facts(static_sparse, _CHOSEN_BEFORE),  # without the run its masks come from
    "lottery_rigl": Facts(rigl, _REWIRED, "rewirings", grows_by_gradient=True),
}
