"""Which errors are one line and an exit status, and which keep their traceback."""

import jax
import jax.numpy as jnp
import pytest

from rigl_optax.data import text
from rigl_optax.training import (
    checkpoints,
    config,
    hosts,
    methods,
    mistakes,
    recovery,
    state,
)


def failing(action):
    try:
        action()
    except BaseException as error:
        return mistakes.status(error)
    raise AssertionError("nothing failed")


def small_state(loss):
    sums = state.zero_sums()._replace(loss=jnp.float32(loss))
    return state.TrainState(jnp.int32(1), {}, {}, (), sums, None)


def inside_jit():
    jax.jit(lambda x: text.steps_per_epoch(1, 1, x.shape[0]))(jnp.ones(3))


def test_what_this_package_refuses_is_a_mistake(small, tmp_path):
    for action in (
        lambda: config.from_mapping({"sparsty": 0.9}),
        lambda: text.wikitext(""),
        lambda: checkpoints.read_config(tmp_path),
        lambda: (tmp_path / "a" / "b").mkdir(),
        inside_jit,
        lambda: hosts.first_does(lambda: text.raw("")),
    ):
        assert failing(action) == 2


def test_what_fails_is_no_mistake(tmp_path):
    with checkpoints.lock(tmp_path):
        assert failing(lambda: checkpoints.lock(tmp_path)) == 1

    def interrupt():
        raise KeyboardInterrupt

    assert failing(interrupt) == 130
    lost = small_state(float("nan"))
    assert failing(lambda: recovery.check(lost)) == 1


def test_what_others_raise_keeps_its_traceback(capsys):
    for action in (
        lambda: jnp.ones(3) + jnp.ones(4),
        lambda: text.steps_per_epoch("3", 1, 1),  # a bug: Python says so, not this package
        lambda: [][1],
        # As when memory runs out: XLA's own RuntimeError.
        lambda: jax.jit(jax.pure_callback, static_argnums=0)(int, jnp.ones(3)).block_until_ready(),
    ):
        assert failing(action) is None
    try:
        [][1]
    except IndexError as error:
        assert mistakes.report(error) == 1
    assert "Traceback" in capsys.readouterr().err


def test_a_key_that_does_not_exist_is_a_mistake(small):
    with pytest.raises(ValueError, match=r"config.sparsty: .*did you mean 'method.sparsity'"):
        config.from_mapping({"sparsty": 0.9})
    wrong = config.changed(small, {"method.mometum": 0.9})
    assert failing(lambda: methods.build(wrong)) == 2
