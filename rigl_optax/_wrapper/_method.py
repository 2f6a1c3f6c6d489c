"""The extension point: what makes one method differ from another, and what it may look at."""

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import jax

from rigl_optax._layout import Layout, SparseLeaf
from rigl_optax._plan import RewiringPlan
from rigl_optax._ranking import _top_k
from rigl_optax._ranking._packing import Packing
from rigl_optax._types import Arrays, PyTree


class RewiringInputs(NamedTuple):
    """What a method sees when it rewires.

    The lists hold *packed* arrays: on one device the sparse leaves lie side by side in a single
    array, padded with inactive zeros; on several devices each leaf is an array of its own. All
    lists are laid out alike, so that elementwise functions of them need not know;
    `packing.ranking_ids` says which layer each row belongs to. Under a
    structure, groups stand in the place of weights, and their magnitudes are pooled.

    A method with a shadow sees the same at every step, with the leaves in their own shapes.

    Attributes:
      count: int32 scalar: calls of `update` before this one.
      weights: float32; of a method with a shadow, the shadow weights.
      gradients: float32, dense: as if there were no mask. What `Method.remember` returns, if the
        method has one.
      masks: bool: what is active.
      second_masks: bool; empty unless `Method.start` made some.
      numbers: What `Method.start` made, or the last `Decision`.
      packing: How the arrays are laid out.
      leaves: The sparse leaves: their paths, shapes, structures.
      indices: int32: the index of each entry in its layer, where only some of the entries are
        there (candidates of condensed weights); else None.
    """

    count: jax.Array  # type: ignore[assignment]
    weights: Arrays
    gradients: Arrays
    masks: Arrays
    second_masks: Arrays
    numbers: PyTree
    packing: Packing
    leaves: Sequence[SparseLeaf]
    indices: Arrays | None = None

    def active(self) -> jax.Array:
        """Counts what is active in each ranking, int32 [rankings].

        A ranking is a layer, or a part of one under `NM` and `ConstantFanIn`.
        """
        return _top_k.counts(self.masks, self.packing.ranking_ids)

    def top_k(self, scores: Arrays, k: jax.Array) -> Arrays:
        """Finds the k largest scores of each ranking; ties go to the lower index.

        Args:
          scores: int32, laid out as `weights`; -1 for never.
          k: int32 [rankings]; at least so many scores of each must be 0 or above.

        Returns:
          Masks, laid out as `weights`.
        """
        return _top_k.top_k(scores, self.packing.ranking_ids, self.packing.per_row(k))


class Decision(NamedTuple):
    """What a rewiring decides, laid out as its inputs.

    Attributes:
      masks: What is active from now on.
      second_masks: None leaves them as they are.
      numbers: None leaves them as they are.
      uninformed: int32 scalar: layers that kept their masks since no score said where to grow.
    """

    masks: Arrays
    second_masks: Arrays | None = None
    numbers: PyTree = None
    uninformed: jax.Array | None = None


class InitialMemory(NamedTuple):
    """What a method remembers from `init` on.

    Attributes:
      second_masks: A second mask of each sparse leaf, in the shape of its grid; or an empty list.
      numbers: A few numbers, in any tree.
    """

    second_masks: Arrays
    numbers: PyTree


# start(layout, packing, masks) -> InitialMemory
Start: TypeAlias = Callable[[Layout, Packing, Arrays], InitialMemory]


class Shadow(NamedTuple):
    """How weights live on while they are inactive.

    The inner optimizer moves the shadow at every step; the masks are renewed after it.

    Attributes:
      backward: `backward(inputs) -> gradients` that the inner optimizer sees.
      settle: `settle(inputs, moved shadow) -> (shadow to store, numbers)`.
      forward: `forward(shadow, masks, numbers) -> weights` of the forward pass; what is not active
        must be exactly 0.
      resets: Whether the optimizer state of a weight starts anew when it becomes active.
      stored: Whether the state holds the shadow. If not, weights are forgotten while they are
        inactive: the inner optimizer moves the weights of the forward pass, and what is not
        active afterwards is 0.
    """

    backward: Callable[[RewiringInputs], Arrays]
    settle: Callable[[RewiringInputs, Arrays], tuple[Arrays, PyTree]]
    forward: Callable[[Arrays, Arrays, PyTree], Arrays]
    resets: bool = False
    stored: bool = True


class Method(NamedTuple):
    """A method of sparse training, for `sparse_transform`: when masks change, and how.

    Use `drop_and_grow` for a method that drops by some scores and grows by others. Everything
    after `rule` has a default that suits most methods.

    Attributes:
      plan: When to rewire, from `rewiring_plan`; None for never.
      rule: `rule(inputs) -> Decision`. As many entries of each ranking must be active as before.
      replaces_step: Whether a rewiring replaces the gradient step. If not, weights that
        stay active take it too; they are ranked as they were before it.
      start: `start(layout, packing, masks) -> InitialMemory`, at `init`.
      remember: `remember(count, memory, gradient) -> memory` of each sparse leaf, float32, at
        every call; zeros at first. The rule then sees the memory in place of the gradients.
      grown_values: `grown_values(inputs, initial weights) -> values` of new weights; None for 0.
      keeps_initial: Whether `grown_values` needs the initial weights.
      grown_state: What the optimizer state of new weights starts from; None for at rest.
      resets_state: `resets_state(count)`, whether the optimizer state of all weights, of dense
        leaves too, starts anew at this rewiring: a bool scalar; None for never.
      snapshot: `snapshot(count)`, whether the state takes a copy of all parameters as they are
        before this call: a bool scalar; None for never.
      shadow: For methods whose weights live on while inactive.
      check: `check(layout, first layout)` raises at `init` what does not suit the method; the
        first layout has the numbers of zeros of the first masks, where they are known.
      ablates: Whether `rule` ablates units where the structure asks for it.
      transposes: Whether `rule` keeps masks of `NM(transposable=True)` so.
      progress: `progress(count)`, how far the numbers of active weights are on their way from the
        first to the final ones after the rewiring at this count; None if they never change.
      final: `final(layout)`, the layout when training ends, where it is not the distribution's.
      excess: `excess(count)`, how many weights more than at the start are active after the
        rewiring at this count, as a fraction of those; None if never any.
      wider: `wider(layout)`, the layout of the weights that have gradients, where these are more
        than the active ones; None otherwise.
      rewiring_flops: `rewiring_flops(layout)`, what deciding costs at a rewiring beside the pass
        backwards, whatever the batch: multiplies and adds; None for nothing that counts.
      moves_between_layers: Whether training decides how many weights of each layer are active.

    Examples:
      New random masks at every rewiring:

      >>> import optax, rigl_optax
      >>> scores = rigl_optax.grow_at_random(seed=1)
      >>> method = rigl_optax.Method(
      ...     plan=rigl_optax.rewiring_plan(begin=0, end=1_000, every=100),
      ...     rule=lambda inputs: rigl_optax.Decision(
      ...         inputs.top_k(scores(inputs), inputs.active())
      ...     ),
      ... )
      >>> tx = rigl_optax.sparse_transform(optax.sgd(0.1), 0.9, method)
    """

    plan: RewiringPlan | None
    rule: Callable[[RewiringInputs], Decision]
    replaces_step: bool = True
    start: Start | None = None
    remember: Callable[[jax.Array, jax.Array, jax.Array], jax.Array] | None = None
    grown_values: Callable[[RewiringInputs, Arrays], Arrays] | None = None
    keeps_initial: bool = False
    grown_state: "GrownState | None" = None
    resets_state: Callable[[jax.Array], jax.Array] | None = None
    snapshot: Callable[[jax.Array], jax.Array] | None = None
    shadow: Shadow | None = None
    check: Callable[[Layout, Layout], None] | None = None
    ablates: bool = False
    transposes: bool = False
    progress: Callable[[int], float] | None = None
    final: Callable[[Layout], Layout] | None = None
    excess: Callable[[int], float] | None = None
    wider: Callable[[Layout], Layout] | None = None
    rewiring_flops: Callable[[Layout], float] | None = None
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
