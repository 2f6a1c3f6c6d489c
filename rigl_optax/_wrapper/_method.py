"""What makes one method differ from another: everything the shared wrapper lets it decide."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax

from rigl_optax._layout import Layout, SparseLeaf
from rigl_optax._plan import RewiringPlan
from rigl_optax._ranking._packing import Packing
from rigl_optax._types import Arrays, PyTree


class RewiringInputs(NamedTuple):
    """What a method may look at when it rewires.

    The lists hold the sparse leaves as `packing` lays them out: side by side in one
    array, or apart; `packing.ranking_ids` says which layer each row belongs to. Where a layer has a
    structure, its groups stand in the place of weights, with their pooled magnitudes.
    """

    count: jax.Array  # type: ignore[assignment]
    weights: Arrays  # float32; of a method with a shadow, the shadow
    gradients: Arrays  # float32, dense: as if there were no mask; or what is remembered of them
    masks: Arrays  # bool
    marks: Arrays  # bool; empty without `Method.start`
    carry: PyTree
    packing: Packing
    leaves: Sequence[SparseLeaf]
    # int32: which entry of its layer each is, where some are left out that would not be chosen
    indices: Arrays | None = None


class Outcome(NamedTuple):
    """What a rewiring decides, laid out as its inputs; None leaves marks or carry as they are."""

    masks: Arrays
    marks: Arrays | None = None
    carry: PyTree = None
    uninformed: jax.Array | None = None  # int32: layers that stayed, as no score said where to grow


class Started(NamedTuple):
    """What a method remembers from the start."""

    marks: Arrays  # a second mask of each sparse leaf, in the shape of its grid; or empty
    carry: PyTree  # a few numbers


Start = Callable[[Layout, Packing, Arrays], Started]


class ShadowView(NamedTuple):
    """What a method with a shadow sees at every step; lists of sparse leaves in their shapes."""

    count: jax.Array  # type: ignore[assignment]
    shadow: Arrays
    gradients: Arrays  # dense, with respect to the weights of the forward pass
    masks: Arrays
    marks: Arrays
    carry: PyTree
    leaves: Sequence[SparseLeaf]


class Shadow(NamedTuple):
    """How weights live on while they are inactive.

    The inner optimizer moves the shadow, at every step; the masks are renewed after it.

    Attributes:
      backward: The gradients that the inner optimizer sees.
      settle: From the view and the moved shadow to the shadow that is stored, and the carry.
      forward: From shadow, masks and carry to the weights of the forward pass; what is not
        active must be exactly 0.
      resets: Whether the optimizer state of a weight starts anew when it becomes active.
    """

    backward: Callable[[ShadowView], Arrays]
    settle: Callable[[ShadowView, Arrays], tuple[Arrays, PyTree]]
    forward: Callable[[Arrays, Arrays, PyTree], Arrays]
    resets: bool = False


class Method(NamedTuple):
    """One method on the shared wrapper.

    Attributes:
      plan: When to rewire; None for never.
      rule: From `RewiringInputs` to the new masks.
      replaces_step: Whether a rewiring replaces the gradient step. If not, weights that
        stay active take it too; they are ranked as they were before it.
      start: At init, from layout, packing and masks to what is remembered besides.
      remember: At every call, from the count, what is remembered of a leaf's gradients and
        its gradient (float32) to what is remembered; zeros at first.
      grown_values: At a rewiring, from its inputs and the initial weights (if
        kept) to the values new weights start at; None for 0.
      keeps_initial: Whether `grown_values` needs the initial weights.
      grown_state: What the optimizer state of new weights starts from; None for at rest.
      shadow: For methods whose weights live on while inactive.
      check: Raises at init if the layout does not suit the method, or the first masks: the second
        argument is the layout with their zeros, where they are known.
      ablates: Whether `rule` ablates units where the structure asks for it.
      progress: `progress(count)`, how far the numbers of active weights are on their way from the
        first to the final ones after the rewiring at this count; None if they never change.
      wider: `wider(layout)`, the layout of the weights that have gradients, where these are more
        than the active ones; None otherwise.
      moves_between_layers: Whether the number of a layer is decided in training.
    """

    plan: RewiringPlan | None
    rule: Callable[[RewiringInputs], Outcome]
    replaces_step: bool = True
    start: Start | None = None
    remember: Callable[[jax.Array, jax.Array, jax.Array], jax.Array] | None = None
    grown_values: Callable[[RewiringInputs, Arrays], Arrays] | None = None
    keeps_initial: bool = False
    grown_state: "GrownState | None" = None
    shadow: Shadow | None = None
    check: Callable[[Layout, Layout], None] | None = None
    ablates: bool = False
    progress: Callable[[int], float] | None = None
    wider: Callable[[Layout], Layout] | None = None
    moves_between_layers: bool = False


class GrownState(NamedTuple):
    """What the optimizer state of a weight that has just grown starts from.

    Attributes:
      gradient_scale: Every slot starts at this times the dense gradient, instead of at rest
        (`initial_acc_scale` of the reference code).
      mean_second_moment: Whether slots of second moments start at their layer's mean over
        the weights that stay active.
    """

    gradient_scale: float = 0.0
    mean_second_moment: bool = False
