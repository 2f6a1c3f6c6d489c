"""A mistake of the user is one line and exit status 2; other errors keep their traceback."""

import pathlib
import sys

import jax
import jax.numpy as jnp
import pytest
from absl import flags

from rigl_optax.data import text
from rigl_optax.training import (
    checkpoints,
    command_line,
    config,
    hosts,
    methods,
    mistakes,
    recovery,
    state,
)

ROOT = pathlib.Path(__file__).parents[2]
# Of ml_collections, which loads a config file in an old way.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
DIGITS = f"--config={ROOT / 'configs' / 'digits_lenet.py'}"


@pytest.fixture
def parsed(monkeypatch, capsys):
    """Parses flags of a script; returns the config, or the line and the exit status."""
    values = flags.FlagValues()
    command_line.define_config(values)
    flags.mark_flag_as_required("config", values)
    monkeypatch.setattr(command_line.flags, "FLAGS", values)

    def parse(*argv):
        monkeypatch.setattr(sys, "argv", ["script", *argv])  # where overrides are looked for
        try:
            command_line.parse(sys.argv)
        except SystemExit as ended:
            (line,) = capsys.readouterr().err.splitlines()
            return line, ended.code
        return command_line.checked()

    return parse


def test_flags_are_parsed(parsed):
    assert parsed(DIGITS, "--config.model.hidden=7").model.hidden == (7,)


@pytest.mark.parametrize(
    ("flag", "told"),
    [
        ("--config.method.sparsity=a lot", "--config.method.sparsity=a lot: could not convert"),
        ("--bogus", "Unknown command line flag 'bogus'"),
    ],
)
def test_wrong_flags_are_one_line(parsed, flag, told):
    line, status = parsed(DIGITS, flag)
    assert told in line and status == 2


def test_flags_change_the_recipe(parsed):
    flags = ("--config.optimizer.name=adam", "--config.optimizer.b2=.95", "--config.mesh.data=1")
    found = parsed(DIGITS, *flags, "--config.method.structure.name=nm")
    # Options belong to what a section names: the momentum of the recipe is SGD's.
    assert found.optimizer.options == {"b2": 0.95} and found.optimizer.weight_decay == 1e-4
    assert found.mesh.data == 1 and found.method.structure.name == "nm"


def test_a_key_that_does_not_exist_is_a_mistake(small):
    with pytest.raises(ValueError, match=r"config.sparsty: .*did you mean 'method.sparsity'"):
        config.from_mapping({"sparsty": 0.9})
    wrong = config.changed(small, {"method.mometum": 0.9})
    assert failing(lambda: methods.build(wrong)) == 2


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "cannot be read"),
        ("def get_config(:", "SyntaxError: "),
        ("import nothing_of_this_name", ", line 1: ModuleNotFoundError: "),
        ("def get_config():\n    raise ValueError('no')", ", line 2: ValueError: no"),
        ("def get_config():\n    return 1 / 0", ", line 2: ZeroDivisionError: "),
        ("def get_config():\n    return {}['a']", ", line 2: KeyError: 'a'"),
        ("def get_config():\n    return 3", "get_config() returned 3, not a ConfigDict"),
        ("def configuration(): pass", "a config file has a function get_config()"),
    ],
)
def test_a_wrong_config_file_is_one_line(parsed, tmp_path, content, told):
    path = tmp_path / "config.py"
    if content is not None:
        path.write_text(content)
    line, status = parsed(f"--config={path}")
    assert line.startswith(f"--config={path}") and told in line and status == 2


def test_without_a_config_it_is_asked_for(parsed):
    assert parsed() == (
        "flag --config=None: Flag --config must have a value other than None.; pass --help for "
        "the flags",
        2,
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


@pytest.mark.parametrize("path", sorted((ROOT / "scripts").glob("*.py")), ids=lambda p: p.stem)
def test_every_script_starts_there(path):
    source = path.read_text()
    if "def main(" in source:
        assert "command_line.run(main)" in source and "app.run" not in source


def test_looking_at_a_run_takes_no_accelerator_unless_told_to(monkeypatch):
    set_to = []
    monkeypatch.setattr(jax.config, "update", lambda name, value: set_to.append((name, value)))
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    command_line.use_cpu()
    assert not set_to
    monkeypatch.delenv("JAX_PLATFORMS")
    command_line.use_cpu()
    assert set_to == [("jax_platforms", "cpu")]
