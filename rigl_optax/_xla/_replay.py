"""Computes an optimizer's updates again, from the state that is stored.

At a rewiring the stored state differs from the state that the inner optimizer returned. If the
updates were computed from the returned state, XLA would read the old state a second time, and copy
every momentum before it is overwritten: `benchmarks/update_overhead.py` prints the ordinary step
against plain Optax. On an ordinary step both states are equal, and on a rewiring step the updates
are not used. So it is right to compute them from the stored state, but XLA cannot know that. Here
the optimizer is traced, and the leaves of its new state are replaced by the stored ones.
`tests/core/test_callbacks.py` shows that callbacks on the host still run once.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax

from rigl_optax._types import PyTree

# `replay(stored) -> updates`: `stored` maps indices of leaves of the new state to stored values.
Replay = Callable[[Mapping[int, jax.Array]], PyTree]


def stepped(
    update: Callable[[], tuple[PyTree, PyTree]], inputs: PyTree
) -> tuple[PyTree, PyTree, Replay]:
    """Calls `update()`, and returns a function that computes its updates from another state.

    Calls to the host (`jax.debug.print`, a callback) run once: the replay uses their results.

    Args:
      update: `update() -> (updates, new_state)`; it is traced.
      inputs: A tree of all arrays that `update` computes from.

    Returns:
      The updates, the new state, and `replay(stored) -> updates`. `stored` maps indices of leaves
      of the new state to values, which replace those leaves before anything else uses them. With
      the new state's own values the updates are the same.
    """
    # Outside of jit nothing is fused or copied, so the first updates serve.
    if not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(inputs)):
        updates, state = update()
        return updates, state, lambda stored: updates
    from jax.extend import core  # slow to import: it brings Pallas

    closed, shapes = jax.make_jaxpr(update, return_shape=True)()
    jaxpr = closed.jaxpr
    treedef, number = jax.tree.structure(shapes), len(jax.tree.leaves(shapes[0]))
    calls = [equation for equation in jaxpr.eqns if _calls_host(equation)]
    results = [v for e in calls for v in e.outvars if not isinstance(v, core.DropVar)]
    # Evaluated, not traced a second time.
    once = jaxpr.replace(outvars=[*jaxpr.outvars, *results])
    leaves = jax.core.eval_jaxpr(once, closed.consts)
    known = dict(zip(results, leaves[len(jaxpr.outvars) :], strict=True))
    updates, state = jax.tree.unflatten(treedef, leaves[: len(jaxpr.outvars)])

    def replay(stored: Mapping[int, jax.Array]) -> PyTree:
        outputs = jaxpr.outvars[number:]
        replaced = known | {
            outputs[index]: value
            for index, value in stored.items()
            # A constant, or a variable that is two leaves at once, cannot be replaced.
            if isinstance(outputs[index], core.Var) and outputs.count(outputs[index]) == 1
        }

        def forget(variable: core.Var) -> core.Var:
            return core.DropVar(variable.aval) if variable in replaced else variable

        # A replaced leaf becomes an argument of the program, and the output of the equation that
        # computed it is dropped.
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
    """Returns whether an equation has an effect, or calls a Python function when it runs."""
    if equation.effects or "callback" in equation.primitive.name:
        return True
    programs = [p for value in equation.params.values() for p in _programs(value)]
    return any(_calls_host(e) for program in programs for e in program.eqns)


def _programs(value: Any) -> list[Any]:
    """Returns the programs inside a parameter of an equation."""
    from jax.extend import core

    if isinstance(value, core.ClosedJaxpr):
        return [value.jaxpr]
    if isinstance(value, core.Jaxpr):
        return [value]
    if isinstance(value, tuple | list):
        return [program for each in value for program in _programs(each)]
    return []
