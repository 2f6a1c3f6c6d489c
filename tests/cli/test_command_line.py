"""A mistake of the user is one line and exit status 2; other errors keep their traceback."""

import pathlib

import jax
import pytest

from rigl_optax_cli import command_line

ROOT = pathlib.Path(__file__).parents[2]
# Of ml_collections, which loads a config file in an old way.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
DIGITS = f"--config={ROOT / 'configs' / 'digits_lenet.py'}"


@pytest.fixture
def parsed(capsys):
    """Parses flags of a command; returns the config, or the line and the exit status."""

    def parse(*argv):
        found = []
        ended = command_line.run(
            lambda values: found.append(command_line.checked(values)), argv, "", with_recipe=True
        )
        if found:
            return found[0]
        (line,) = capsys.readouterr().err.splitlines()
        return line, ended

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
        ("def configuration(): pass", "a recipe has a function get_config()"),
    ],
)
def test_a_wrong_config_file_is_one_line(parsed, tmp_path, content, told):
    path = tmp_path / "config.py"
    if content is not None:
        path.write_text(content)
    line, status = parsed(f"--config={path}")
    assert line.startswith(f"--config={path}") and told in line and status == 2


def test_without_a_recipe_it_is_asked_for(parsed):
    line, status = parsed()
    assert line.startswith("which recipe?") and "digits_lenet, " in line and status == 2


def test_looking_at_a_run_takes_no_accelerator_unless_told_to(monkeypatch):
    set_to = []
    monkeypatch.setattr(jax.config, "update", lambda name, value: set_to.append((name, value)))
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    command_line.use_cpu()
    assert not set_to
    monkeypatch.delenv("JAX_PLATFORMS")
    command_line.use_cpu()
    assert set_to == [("jax_platforms", "cpu")]
