"""Files that come from elsewhere: taken, or refused with one clear error; never executed."""

import ast
import gc
import pathlib
import pickle
import random
import time

import pytest

from benchmarks import fuzz_loaders, loader_fuzz
from rigl_optax.training import files

ROOT = pathlib.Path(__file__).parents[2]
SOURCES = [*ROOT.glob("rigl_optax*/**/*.py"), *ROOT.glob("configs/*.py")]
FILES = {"page": 2, "checkpoint": 12, "cifar10": 5}  # the slow ones; of the others 60


@pytest.fixture(scope="module")
def targets(tmp_path_factory):
    return loader_fuzz.targets(tmp_path_factory.mktemp("sound"))


@pytest.fixture
def settled(name):
    """What Orbax has given up ends within the test that may ignore it."""
    yield
    for _ in range(3 * (name == "checkpoint")):
        time.sleep(0.1)
        gc.collect()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("name", fuzz_loaders.SHARES)
def test_a_mutated_file_is_taken_or_refused(name, targets, settled):
    generator = random.Random(name)
    targets[name].load()
    ends = [loader_fuzz.trial(targets[name], generator) for _ in range(FILES.get(name, 60))]
    assert "refused" in ends
    targets[name].load()


def test_nothing_is_unpickled(targets, monkeypatch):
    def refuse(*args, **keys):
        raise AssertionError("something was unpickled")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    for name in ("config", "metrics", "result", "export", "checkpoint"):
        targets[name].load()


def test_no_source_names_what_executes_what_it_reads():
    assert len(SOURCES) > 60
    modules = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            imported = []
            if isinstance(node, ast.Import):
                imported = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                imported = [node.module or ""]
            assert not modules & {name.split(".")[0] for name in imported}, path
            if isinstance(node, ast.Call):
                called = node.func
                if isinstance(called, ast.Name):
                    assert called.id not in ("eval", "exec", "compile", "__import__"), path
                pickled = [k.value for k in node.keywords if k.arg == "allow_pickle"]
                assert all(isinstance(v, ast.Constant) and v.value is False for v in pickled), path


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[]", r"it is \[\], not an object"),
        ('{"a": {}}', r"it has no 'b'"),
        ('{"a": true, "b": []}', r"it\['a'\] is True, not int"),
        ('{"a": 1, "b": [1]}', r"it\['b'\]\[0\] is 1, not str"),
        ('{"a": 9223372036854775808, "b": []}', r"it\['a'\] is 9223372036854775808, not int"),
        ('{"a": 1', "delimiter"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(text, problem):
    with pytest.raises(ValueError, match=problem):
        files.parse(text, {"a": (int,), "b": [(str,)]})
    assert files.parse('{"a": 1, "b": ["x"], "c": null}', {"a": (int,)})["c"] is None
