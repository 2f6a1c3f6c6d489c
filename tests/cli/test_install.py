"""The wheel holds what the command needs and no more, and works outside a clone."""

import hashlib
import os
import pathlib
import re
import subprocess
import sys
import tarfile
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parents[2]
TINY = ["--config.steps=2", "--config.model.hidden=6", "--config.method.every=2"]
# Of the environment of tests: eight devices would each need a part of the batch.
ONE_DEVICE = "--config.mesh.data=1"

BLOCKED = """
import sys
for name in ("cv2", "PIL", "simplejpeg", "array_record", "google_crc32c"):
    sys.modules[name] = None
import rigl_optax_cli
run = [f"--workdir={sys.argv[1]}", *sys.argv[3:]]
assert rigl_optax_cli.main(["train", "digits_lenet", *run]) == 0
photos = ["--config.data.name=image_folder", "--config.data.image_size=8"]
photos += [f"--config.data.dir={sys.argv[2]}"]
assert rigl_optax_cli.main(["explain", "digits_lenet", *photos]) == 2
"""


def build(source, out):
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(out)]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    return {path.name: path for path in out.iterdir()}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    pytest.importorskip("hatchling")
    return build(ROOT, tmp_path_factory.mktemp("dist"))


def only(built, suffix):
    (path,) = [path for name, path in built.items() if name.endswith(suffix)]
    return path


@pytest.mark.slow
def test_the_source_archive_holds_all_and_builds_the_same_bytes(built, tmp_path):
    with tarfile.open(only(built, ".tar.gz")) as archive:
        archive.extractall(tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    assert {path.name for path in source.iterdir()} == {
        *("rigl_optax", "rigl_optax_cli", "configs", "pyproject.toml", "PKG-INFO", ".gitignore"),
        *("README.md", "LICENSE", "CHANGELOG.md"),
    }
    again = build(source, tmp_path / "dist")
    assert {name: digest(path) for name, path in again.items()} == {
        name: digest(path) for name, path in built.items()
    }


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.slow
def test_the_wheel_holds_only_the_packages(built):
    names = set(zipfile.ZipFile(only(built, ".whl")).namelist())
    (metadata,) = {name.split("/")[0] for name in names if ".dist-info/" in name}
    assert {name.split("/")[0] for name in names} == {"rigl_optax", "rigl_optax_cli", metadata}
    ours = {name for name in names if not name.startswith(metadata)}
    tracked = [path for folder in ("rigl_optax", "rigl_optax_cli") for path in files(folder)]
    recipes = [f"rigl_optax_cli/configs/{path.name}" for path in (ROOT / "configs").glob("*.py")]
    assert ours == {*tracked, *recipes}


def files(folder):
    found = (path for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".typed"))
    return [str(path.relative_to(ROOT)) for path in found]


@pytest.fixture(scope="module")
def outside(built, tmp_path_factory):
    """Runs a command in an empty folder, with the wheel before anything else on the path."""
    target, folder = tmp_path_factory.mktemp("installed"), tmp_path_factory.mktemp("outside")
    install = ["pip", "install", "-q", "--no-deps", "--no-index", f"--target={target}"]
    subprocess.run([sys.executable, "-m", *install, only(built, ".whl")], check=True)
    environment = os.environ | {"PYTHONPATH": str(target), "MALLOC_ARENA_MAX": "4"}

    def run(*words):
        command = [str(target / "bin" / word) if word == "rigl-optax" else word for word in words]
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    program = "import rigl_optax, rigl_optax_cli as x; print(rigl_optax.__file__, x.__file__)"
    for word in run(sys.executable, "-c", program).split():
        assert pathlib.Path(word).is_relative_to(target)
    return run


@pytest.mark.slow
def test_an_installed_command_trains_a_recipe_by_name(outside):
    assert "\n  digits_lenet " in outside("rigl-optax", "--help")
    shown = outside("rigl-optax", "train", "digits_lenet", "--workdir=run", *TINY)
    assert "test accuracy" in shown
    assert "accuracy" in outside("rigl-optax", "evaluate", "--workdir=run")


@pytest.mark.slow
def test_the_example_of_the_readme_runs_installed(outside):
    (code,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.S | re.M)
    assert "sparse layers: " in outside(sys.executable, "-c", code)


def test_digits_need_no_libraries_of_images(tmp_path):
    for split in ("train", "val"):
        for i in range(20):
            path = tmp_path / "photos" / split / f"class{i % 2}" / f"{i}.jpeg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    words = [
        str(tmp_path / "run"),
        str(tmp_path / "photos"),
        *TINY,
        ONE_DEVICE,
        "--num_processes=1",
    ]
    command = [sys.executable, "-c", BLOCKED, *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1] == (
        "this dataset needs cv2: pip install 'rigl-optax[images]'"
    )
