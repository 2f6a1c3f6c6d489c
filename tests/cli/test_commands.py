"""The command `rigl-optax`: what it lists and what it refuses, and one run from a recipe's name."""

import json
import pathlib
import signal
import subprocess
import sys

import pytest

import rigl_optax
import rigl_optax_cli
from rigl_optax.training import config
from rigl_optax_cli import recipes

ROOT = pathlib.Path(__file__).parents[2]
# Of ml_collections, which loads a recipe in an old way.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
TINY = [
    "--config.steps=4",
    "--config.model.hidden=6",
    "--config.method.every=2",
    "--config.mesh.data=1",
]

HELP = """
import sys
import rigl_optax_cli
assert rigl_optax_cli.main(["--help"]) == 0 and "jax" not in sys.modules
assert rigl_optax_cli.main(["explian"]) == 2 and "jax" not in sys.modules
"""


def test_help_lists_commands_and_recipes_without_importing_jax():
    shown = subprocess.run([sys.executable, "-c", HELP], check=True, capture_output=True, text=True)
    names = [line.split()[0] for line in shown.stdout.splitlines() if line[:2] == "  " != line[2:]]
    for name in (*rigl_optax_cli.COMMANDS, *recipes.known()):
        (line,) = [x for x in shown.stdout.splitlines() if x.startswith(f"  {name} ")]
        assert len(line.split()) > 4
    assert names.count("rigl-optax") == 4
    assert shown.stderr.startswith("rigl-optax explian: no such command; did you mean explain?")


def test_the_recipes_are_those_of_configs():
    assert {path.resolve() for path in recipes.known().values()} == {
        path.resolve() for path in (ROOT / "configs").glob("*.py")
    }


def test_the_version_is_the_package_s(capsys):
    assert rigl_optax_cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith(f"rigl-optax {rigl_optax.__version__} (jax ")


@pytest.mark.parametrize("name", rigl_optax_cli.COMMANDS)
def test_every_command_says_how_to_use_it(name, capsys):
    assert rigl_optax_cli.main([name, "--help"]) == 0
    shown = capsys.readouterr().out
    assert (f"\n    rigl-optax {name} " in shown and "--workdir" in shown) or name == "explain"
    assert all(len(line) <= 100 for line in shown.splitlines())
    assert ("RECIPE" in shown) == (name in ("explain", "train", "compare"))
    for key in config.known_keys() if "RECIPE" in shown else ():
        assert key.rpartition(".")[2] in shown


@pytest.mark.parametrize("name", rigl_optax_cli.COMMANDS)
def test_every_command_has_a_script(name):
    script = (ROOT / "scripts" / f"{name}.py").read_text()
    assert script.endswith(f'\nimport rigl_optax_cli\n\nrigl_optax_cli.start("{name}")\n')


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["digit_lenet"], "'digit_lenet': there is no such recipe; did you mean digits_lenet"),
        (["--config=digit_lenet"], "there is no such recipe; did you mean digits_lenet"),
        ([], "which recipe? Give, as the first word, a path or one of cifar10_wrn22_2, digits"),
        (["digits_lenet", "more"], "'more': there is nothing to do with this word"),
        (["digits_lenet", "--jsn"], "Unknown command line flag 'jsn'. Did you mean: json"),
        (["digits_lenet", "--config.method.sparsty=.9"], "no such key (did you mean 'sparsity'?)"),
        (["digits_lenet", "--config.sparsity=.9"], "(did you mean 'config.method.sparsity'?)"),
        (["digits_lenet", "--config.method.sparsity=2"], "config.method.sparsity"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(words, told, capsys):
    assert rigl_optax_cli.main(["explain", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert told in line


def test_what_a_command_lacks_is_named(monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "rigl_optax_cli.report", raising=False)
    monkeypatch.setitem(sys.modules, "rigl_optax.reports", None)
    with pytest.raises(ModuleNotFoundError):  # a part of this package: a bug, not an extra
        rigl_optax_cli.main(["report"])
    monkeypatch.setitem(sys.modules, "absl", None)
    assert rigl_optax_cli.main(["report"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "rigl-optax report needs absl: pip install 'rigl-optax[train]'"


@pytest.mark.parametrize("words", [["--help"], ["explain", "digits_lenet"]])
def test_a_reader_that_stops_ends_a_command_quietly(words):
    command = [sys.executable, "-m", "rigl_optax_cli", *words]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as shown:
        assert shown.stdout is not None and shown.stderr is not None
        shown.stdout.close()  # as `head -0` does, before anything is written
        assert shown.stderr.read() == b""
    assert shown.returncode == 128 + signal.SIGPIPE


def test_another_broken_pipe_keeps_its_traceback(monkeypatch):
    def main(_):
        raise BrokenPipeError("a socket")

    monkeypatch.setattr(rigl_optax_cli, "main", main)
    monkeypatch.setattr(sys, "argv", ["rigl-optax", "--help"])
    with pytest.raises(BrokenPipeError, match="a socket"):
        rigl_optax_cli.start()


def test_a_run_from_the_name_of_a_recipe(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert rigl_optax_cli.main(["explain", "digits_lenet", "--json", *TINY]) == 0
    explained = json.loads(capsys.readouterr().out)
    train = ["train", "digits_lenet", "--workdir=run", *TINY]
    assert rigl_optax_cli.main([*train, "--num_processes=1"]) == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["active_weights"] == {x["path"]: x["active"] for x in explained["layers"]}
    capsys.readouterr()
    assert rigl_optax_cli.main(["evaluate", "--workdir=run"]) == 0
    assert f"loss {result['test']['loss']:.4f}" in capsys.readouterr().out
