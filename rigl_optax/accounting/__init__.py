"""Counts FLOPs and bytes of sparse training before the first step."""

from rigl_optax.accounting.costs import METHODS as METHODS
from rigl_optax.accounting.costs import FlopsCounter as FlopsCounter
from rigl_optax.accounting.costs import MethodCost as MethodCost
from rigl_optax.accounting.costs import StepCost as StepCost
from rigl_optax.accounting.costs import cumulative_cost as cumulative_cost
from rigl_optax.accounting.costs import flops_at_sparsity as flops_at_sparsity
from rigl_optax.accounting.costs import flops_of_masks as flops_of_masks
from rigl_optax.accounting.costs import published_cost as published_cost
from rigl_optax.accounting.costs import training_cost as training_cost
from rigl_optax.accounting.explanation import explain as explain
from rigl_optax.accounting.flops import Cost as Cost
from rigl_optax.accounting.flops import Unattributed as Unattributed
from rigl_optax.accounting.flops import count_flops as count_flops
from rigl_optax.accounting.report import Explanation as Explanation
from rigl_optax.accounting.report import LayerReport as LayerReport
from rigl_optax.accounting.storage import RewiringBytes as RewiringBytes
from rigl_optax.accounting.storage import StorageBytes as StorageBytes
from rigl_optax.accounting.storage import UpdateBytes as UpdateBytes
from rigl_optax.accounting.storage import compiled_update_bytes as compiled_update_bytes
from rigl_optax.accounting.storage import leaf_bytes as leaf_bytes
from rigl_optax.accounting.storage import optimizer_bytes as optimizer_bytes
from rigl_optax.accounting.storage import rewiring_bytes as rewiring_bytes
from rigl_optax.accounting.storage import storage_at as storage_at
from rigl_optax.accounting.storage import storage_bytes as storage_bytes
