"""RigL and its relatives as Optax gradient transformations."""

from rigl_optax._distributions import Distribution as Distribution
from rigl_optax._distributions import default_dense as default_dense
from rigl_optax._distributions import erdos_renyi as erdos_renyi
from rigl_optax._distributions import erk as erk
from rigl_optax._distributions import uniform as uniform
from rigl_optax._masks import apply_masks as apply_masks
from rigl_optax._masks import get_masks as get_masks
from rigl_optax._schedules import constant_drop_fraction as constant_drop_fraction
from rigl_optax._schedules import cosine_drop_fraction as cosine_drop_fraction
from rigl_optax._schedules import inverse_power_drop_fraction as inverse_power_drop_fraction
from rigl_optax._schedules import linear_drop_fraction as linear_drop_fraction
from rigl_optax._state import SparseState as SparseState
from rigl_optax.accounting.explanation import explain as explain
from rigl_optax.methods.evolutionary import (
    sparse_evolutionary_training as sparse_evolutionary_training,
)
from rigl_optax.methods.rigl import rigl as rigl
from rigl_optax.methods.static import static_sparse as static_sparse
