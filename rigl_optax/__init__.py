"""RigL and its relatives as Optax gradient transformations.

A method wraps an optimizer: `rigl(optax.sgd(0.1), sparsity=0.9, end=25_000)`. Where things are:

- `methods`: one module per family; `_wrapper`: one call of `update`, which all of them share;
- `_ranking`: scores in, masks out; `_xla`: code that is only there for the compiler;
- `_distributions`, `_structures`, `_axes`: how sparse layers are, and in which groups;
- `_plan`, `_schedules`: when to rewire, and how much to drop;
- `_layout`, `_paths`, `_state`, `_masks`: leaves, their names, the state and its masks;
- `condensed`: only active blocks are stored; `_start`: trained weights, found by name;
- `export`: files of active weights, and smaller dense networks;
- `accounting`, `analysis`: what training costs; how masks move;
- `models`, `data`, `training`, `reports`: what `rigl-optax` is made of; nothing above imports them.
"""

import importlib as _importlib
from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

from rigl_optax._adam import adamw as adamw
from rigl_optax._adam import scale_by_adam as scale_by_adam
from rigl_optax._axes import KernelAxes as KernelAxes
from rigl_optax._axes import default_axes as default_axes
from rigl_optax._axes import equinox_axes as equinox_axes
from rigl_optax._axes import flax_axes as flax_axes
from rigl_optax._distributions import DenseLayers as DenseLayers
from rigl_optax._distributions import Distribution as Distribution
from rigl_optax._distributions import default_dense as default_dense
from rigl_optax._distributions import erdos_renyi as erdos_renyi
from rigl_optax._distributions import erk as erk
from rigl_optax._distributions import nothing_dense as nothing_dense
from rigl_optax._distributions import uniform as uniform
from rigl_optax._initialization import sparse_aware_init as sparse_aware_init
from rigl_optax._masks import apply_masks as apply_masks
from rigl_optax._masks import check as check
from rigl_optax._masks import get_masks as get_masks
from rigl_optax._mupar import mupar_factors as mupar_factors
from rigl_optax._mupar import scale_by_factors as scale_by_factors
from rigl_optax._plan import RewiringPlan as RewiringPlan
from rigl_optax._plan import rewiring_plan as rewiring_plan
from rigl_optax._ranking._scores import add_scores as add_scores
from rigl_optax._ranking._top_k import magnitude_scores as magnitude_scores
from rigl_optax._schedules import constant_drop_fraction as constant_drop_fraction
from rigl_optax._schedules import cosine_drop_fraction as cosine_drop_fraction
from rigl_optax._schedules import inverse_power_drop_fraction as inverse_power_drop_fraction
from rigl_optax._schedules import linear_drop_fraction as linear_drop_fraction
from rigl_optax._start import nonzero_masks as nonzero_masks
from rigl_optax._start import start_from as start_from
from rigl_optax._state import SparseState as SparseState
from rigl_optax._structures import NM as NM
from rigl_optax._structures import Block as Block
from rigl_optax._structures import ConstantFanIn as ConstantFanIn
from rigl_optax._structures import Unstructured as Unstructured
from rigl_optax._wrapper._method import Decision as Decision
from rigl_optax._wrapper._method import InitialMemory as InitialMemory
from rigl_optax._wrapper._method import Method as Method
from rigl_optax._wrapper._method import RewiringInputs as RewiringInputs
from rigl_optax._wrapper._method import Shadow as Shadow
from rigl_optax._wrapper._newborn import Grown as Grown
from rigl_optax._wrapper._transform import sparse_transform as sparse_transform
from rigl_optax.methods._drop_and_grow import drop_and_grow as drop_and_grow
from rigl_optax.methods._drop_and_grow import grow_at_random as grow_at_random
from rigl_optax.methods._drop_and_grow import grow_by_gradient as grow_by_gradient
from rigl_optax.methods._drop_and_grow import keep_by_magnitude as keep_by_magnitude
from rigl_optax.methods.alternating import acdc as acdc
from rigl_optax.methods.alternating import dense_model as dense_model
from rigl_optax.methods.cannistraci_hebb import cht as cht
from rigl_optax.methods.deep_rewiring import deep_rewiring as deep_rewiring
from rigl_optax.methods.dense_finetuning import spdf as spdf
from rigl_optax.methods.evolutionary import (
    sparse_evolutionary_training as sparse_evolutionary_training,
)
from rigl_optax.methods.hard_thresholding import (
    iterative_hard_thresholding as iterative_hard_thresholding,
)
from rigl_optax.methods.lottery import lottery_ticket as lottery_ticket
from rigl_optax.methods.mest import mest as mest
from rigl_optax.methods.momentum import sparse_momentum as sparse_momentum
from rigl_optax.methods.pruning import gradual_magnitude_pruning as gradual_magnitude_pruning
from rigl_optax.methods.pruning import granet as granet
from rigl_optax.methods.reparameterization import (
    dynamic_sparse_reparameterization as dynamic_sparse_reparameterization,
)
from rigl_optax.methods.rigl import rigl as rigl
from rigl_optax.methods.saliency import grasp_masks as grasp_masks
from rigl_optax.methods.saliency import magnitude_masks as magnitude_masks
from rigl_optax.methods.saliency import snip_masks as snip_masks
from rigl_optax.methods.saliency import synflow_masks as synflow_masks
from rigl_optax.methods.shadow import dnw as dnw
from rigl_optax.methods.shadow import top_kast as top_kast
from rigl_optax.methods.soft_threshold import soft_thresholding as soft_thresholding
from rigl_optax.methods.static import static_sparse as static_sparse

__version__ = "0.1.0"  # pyproject.toml reads it here

# Imported on first use, so that `import rigl_optax` stays quick.
if _TYPE_CHECKING:
    from rigl_optax.accounting.explanation import explain as explain
    from rigl_optax.accounting.widths import iso_flop_width as iso_flop_width
    from rigl_optax.accounting.widths import small_dense_width as small_dense_width
_LAZY = {
    **dict.fromkeys(("accounting", "analysis", "condensed", "export"), ""),
    "explain": "accounting.explanation",
    "iso_flop_width": "accounting.widths",
    "small_dense_width": "accounting.widths",
}

__all__ = [
    "NM",
    "Block",
    "ConstantFanIn",
    "Decision",
    "DenseLayers",
    "Distribution",
    "Grown",
    "InitialMemory",
    "KernelAxes",
    "Method",
    "RewiringInputs",
    "RewiringPlan",
    "Shadow",
    "SparseState",
    "Unstructured",
    "accounting",
    "acdc",
    "adamw",
    "add_scores",
    "analysis",
    "apply_masks",
    "check",
    "cht",
    "condensed",
    "constant_drop_fraction",
    "cosine_drop_fraction",
    "deep_rewiring",
    "default_axes",
    "default_dense",
    "dense_model",
    "dnw",
    "drop_and_grow",
    "dynamic_sparse_reparameterization",
    "equinox_axes",
    "erdos_renyi",
    "erk",
    "explain",
    "export",
    "flax_axes",
    "get_masks",
    "gradual_magnitude_pruning",
    "granet",
    "grasp_masks",
    "grow_at_random",
    "grow_by_gradient",
    "inverse_power_drop_fraction",
    "iso_flop_width",
    "iterative_hard_thresholding",
    "keep_by_magnitude",
    "linear_drop_fraction",
    "lottery_ticket",
    "magnitude_masks",
    "magnitude_scores",
    "mest",
    "mupar_factors",
    "nonzero_masks",
    "nothing_dense",
    "rewiring_plan",
    "rigl",
    "scale_by_adam",
    "scale_by_factors",
    "small_dense_width",
    "snip_masks",
    "soft_thresholding",
    "sparse_aware_init",
    "sparse_evolutionary_training",
    "sparse_momentum",
    "sparse_transform",
    "spdf",
    "start_from",
    "static_sparse",
    "synflow_masks",
    "top_kast",
    "uniform",
]


def __getattr__(name: str) -> _Any:
    module = _LAZY.get(name)
    if module == "":
        return _importlib.import_module(f"{__name__}.{name}")
    if module is not None:
        return getattr(_importlib.import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
