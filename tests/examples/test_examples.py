"""Every example runs, briefly, and learns something."""

import pathlib
import runpy
import sys

import jax
import matplotlib
import pytest

FOLDER = pathlib.Path(__file__).parents[2] / "examples"

# Steps of a short run, and what it has to reach: ten digits are 0.1 by chance.
BRIEFLY = {
    "plain_jax": (300, 0.7),
    "flax_nnx": (100, 0.6),
    "flax_linen": (100, 0.6),
    "equinox_conv": (150, 0.6),
    "haiku_mlp": (300, 0.7),
    "around_and_inside": (600, 0.6),
    "vit": (150, 0.4),
}


@pytest.fixture(autouse=True)
def where_scripts_look(monkeypatch):
    """A script's own folder comes first, as when Python runs it."""
    monkeypatch.syspath_prepend(str(FOLDER))


def main_of(name):
    return runpy.run_path(str(FOLDER / f"{name}.py"))["main"]


def test_there_is_a_test_for_each_file():
    others = {"gpt", "eight_devices", "reinforcement_learning", "story"}
    assert {path.stem for path in FOLDER.glob("*.py")} == set(BRIEFLY) | others


@pytest.mark.slow
@pytest.mark.parametrize("name", BRIEFLY)
def test_it_learns_digits(name):
    steps, least = BRIEFLY[name]
    assert main_of(name)(steps) > least


@pytest.mark.slow
def test_gpt(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(
        "All flesh is grass, and all its beauty is like the flower of the field. " * 400
    )
    assert main_of("gpt")(40, str(text)) < 6


def test_eight_devices():
    assert len(jax.devices()) == 8
    assert main_of("eight_devices")(15) == 1


@pytest.mark.slow
def test_reinforcement_learning():
    pytest.importorskip("gymnax", reason="admits no JAX as new as this one")
    found = main_of("reinforcement_learning")(20, widths=(32,))
    assert set(found) == {("dense", 32), ("static", 32), ("rigl", 32)}
    assert all(9 < value <= 500 for value in found.values())  # a random policy lasts about 20 steps


@pytest.mark.slow
def test_story(tmp_path, monkeypatch):
    source = (FOLDER / "story.py").read_text()
    assert source.count("= 2_000, 50, 0.98") == 1
    source = source.replace("= 2_000, 50, 0.98", "= 200, 10, 0.98")
    monkeypatch.setattr(sys, "argv", ["story.py", str(tmp_path)])
    matplotlib.use("agg")
    exec(compile(source, "story.py", "exec"), {"__name__": "story"})
    assert {path.stem for path in tmp_path.glob("*.png")} == {"digits", "accuracy", "connections"}
