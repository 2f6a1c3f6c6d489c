"""Stores only the active weights of sparse kernels, as blocks or one by one, and trains them so.

No dense weight, gradient or optimizer state exists at any time, rewirings included.
"""

from rigl_optax.condensed._choice import Choice as Choice
from rigl_optax.condensed._choice import choose as choose
from rigl_optax.condensed._choice import measured_ratio as measured_ratio
from rigl_optax.condensed._conversion import bind as bind
from rigl_optax.condensed._conversion import condense as condense
from rigl_optax.condensed._conversion import condense_csr as condense_csr
from rigl_optax.condensed._conversion import condense_state as condense_state
from rigl_optax.condensed._conversion import densify as densify
from rigl_optax.condensed._conversion import densify_state as densify_state
from rigl_optax.condensed._conversion import extract as extract
from rigl_optax.condensed._conversion import masks_of as masks_of
from rigl_optax.condensed._conversion import probes as probes
from rigl_optax.condensed._initialization import random_topology as random_topology
from rigl_optax.condensed._initialization import random_values as random_values
from rigl_optax.condensed._kernel import Kernel as Kernel
from rigl_optax.condensed._topology import Topology as Topology
from rigl_optax.condensed._training import CondensedState as CondensedState
from rigl_optax.condensed._training import CondensedTransformation as CondensedTransformation
from rigl_optax.condensed._training import mest as mest
from rigl_optax.condensed._training import rigl as rigl
from rigl_optax.condensed._training import (
    sparse_evolutionary_training as sparse_evolutionary_training,
)
from rigl_optax.condensed._training import static_sparse as static_sparse
from rigl_optax.condensed._training import value_and_grad as value_and_grad
from rigl_optax.condensed._training import value_grad_and_scores as value_grad_and_scores
from rigl_optax.condensed.blocks._convolution import convolve as convolve
from rigl_optax.condensed.blocks._costs import Cost as Cost
from rigl_optax.condensed.blocks._costs import product_costs as product_costs
from rigl_optax.condensed.blocks._kernel import BlockSparse as BlockSparse
from rigl_optax.condensed.blocks._kernel import matmul as matmul
from rigl_optax.condensed.blocks._recurrence import gru as gru
from rigl_optax.condensed.blocks._recurrence import lstm as lstm
from rigl_optax.condensed.blocks._table import PRODUCTS as PRODUCTS
from rigl_optax.condensed.blocks._table import products as products
from rigl_optax.condensed.blocks._topology import BlockTopology as BlockTopology
from rigl_optax.condensed.blocks._topology import as_blocks as as_blocks
from rigl_optax.condensed.single._csr import CSR as CSR
from rigl_optax.condensed.single._csr_topology import CSRTopology as CSRTopology
from rigl_optax.condensed.single._csr_topology import csr_topology as csr_topology
