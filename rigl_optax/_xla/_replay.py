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

from rigl_optax._types import PyTree

# From leaves that stand for those of the new state, by their index, to updates.
Replay = Callable[[Mapping[int, jax.Array]], PyTree]


def stepped(
    update: Callable[[], tuple[PyTree, PyTree]], inputs: PyTree
) -> tuple[PyTree, PyTree, Replay]:
    """`update()`, and a function that computes its updates again from a state to be stored.

    What the optimizer has called on the host (`jax.debug.print`, a callback) is called once: the
    second time the results of the first are used.

    Args:
      update: Returns updates and the new inner state; it is traced.
      inputs: What it computes from. Outside of jit nothing fuses and nothing is gained: there the
        updates are handed back as they are.

    Returns:
      Updates, the new state, and a function: from leaves of the new state, by their index, to a
      tree like the updates, in which those leaves are replaced before anything else uses them. Of
      the same values as long as they are the new state's.
    """
    if not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(inputs)):
        updates, state = update()
        return updates, state, lambda stored: updates
    closed, shapes = jax.make_jaxpr(update, return_shape=True)()
    jaxpr = closed.jaxpr
    treedef, number = jax.tree.structure(shapes), len(jax.tree.leaves(shapes[0]))
    calls = [equation for equation in jaxpr.eqns if _calls_host(equation)]
    results = [v for e in calls for v in e.outvars if not isinstance(v, core.DropVar)]
    if calls:
        once = jaxpr.replace(outvars=[*jaxpr.outvars, *results])
        leaves = jax.core.eval_jaxpr(once, closed.consts)
        known = dict(zip(results, leaves[len(jaxpr.outvars) :], strict=True))
        updates, state = jax.tree.unflatten(treedef, leaves[: len(jaxpr.outvars)])
    else:
        known = {}
        updates, state = update()

    def replay(stored: Mapping[int, jax.Array]) -> PyTree:
        outputs = jaxpr.outvars[number:]
        replaced = known | {
            outputs[index]: value
            for index, value in stored.items()
            if isinstance(outputs[index], core.Var) and outputs.count(outputs[index]) == 1
        }

        def forget(variable: core.Var) -> core.Var:
            return core.DropVar(variable.aval) if variable in replaced else variable

        # What stands for a leaf comes in as an argument, and what computed it is not heard.
        equations = [
            e.replace(outvars=[forget(v) for v in e.outvars]) for e in jaxpr.eqns if e not in calls
        ]
        rest = jaxpr.replace(
            invars=list(replaced), outvars=jaxpr.outvars[:number], eqns=equations, effects=set()
        )
        again = jax.core.eval_jaxpr(rest, closed.consts, *replaced.values())
        return jax.tree.unflatten(jax.tree.structure(updates), again)

    return updates, state, replay


def _calls_host(equation: Any) -> bool:
    """Whether an equation has an effect, or calls a Python function as the program runs."""
    if equation.effects or "callback" in equation.primitive.name:
        return True
    programs = [p for value in equation.params.values() for p in _programs(value)]
    return any(_calls_host(e) for program in programs for e in program.eqns)


def _programs(value: Any) -> list[core.Jaxpr]:
    """The programs in a parameter of an equation."""
    if isinstance(value, core.ClosedJaxpr):
        return [value.jaxpr]
    if isinstance(value, core.Jaxpr):
        return [value]
    if isinstance(value, tuple | list):
        return [program for each in value for program in _programs(each)]
    return []
