"""Updates of an optimizer, computed from the state that is stored rather than a copy of it.

At a rewiring the state that is stored differs from the one the inner optimizer returned.
Computed from the latter, its updates need a second pass over the old state, and XLA has
to copy every momentum before it is overwritten. On an ordinary step both states are the
same numbers, and on a rewiring step the updates are not used, so they may as well be
computed from the stored one. XLA cannot know that; here it is told.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.extend import core

PyTree = Any


def with_stored_state(
    update: Callable[[], tuple[PyTree, PyTree]],
    updates: PyTree,
    stored: Mapping[int, jax.Array],
) -> PyTree:
    """`update()[0]`, with leaves of the new state replaced before anything else uses them.

    Args:
      update: Returns updates and the new inner state; it is traced.
      updates: What it returned as updates; handed back as they are outside of jit, where
        nothing fuses and nothing is gained.
      stored: By index of a leaf of the new state, what stands for it.

    Returns:
      A tree like `updates`, of the same values as long as `stored` are the new state's.
    """
    if not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(updates)):
        return updates
    closed = jax.make_jaxpr(update)()
    jaxpr = closed.jaxpr
    number = len(jax.tree.leaves(updates))
    outputs = jaxpr.outvars[number:]
    replaced = {
        outputs[index]: value
        for index, value in stored.items()
        if isinstance(outputs[index], core.Var) and outputs.count(outputs[index]) == 1
    }

    def forget(variable: core.Var) -> core.Var:
        return core.DropVar(variable.aval) if variable in replaced else variable

    # What stands for a leaf comes in as an argument, and what computed it is not heard.
    equations = [e.replace(outvars=[forget(v) for v in e.outvars]) for e in jaxpr.eqns]
    rest = jaxpr.replace(invars=list(replaced), outvars=jaxpr.outvars[:number], eqns=equations)
    leaves = jax.core.eval_jaxpr(rest, closed.consts, *replaced.values())
    return jax.tree.unflatten(jax.tree.structure(updates), leaves)
