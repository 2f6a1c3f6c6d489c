import importlib
import importlib.util
import pathlib
import re
import shlex

import numpy as np
import optax
import pytest

import rigl_optax
import rigl_optax_cli
from rigl_optax.training import config
from rigl_optax_cli import command_line

ROOT = pathlib.Path(__file__).parents[2]
DOCS = ROOT / "docs"


def _name(page):
    return str(page.relative_to(ROOT))


PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]


def _script(name):
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "name", ["accelerators", "config", "optimizers", "recipes", "sizes", "structured", "vision"]
)
def test_tables_are_those_of_the_sources_and_records(name):
    module = _script(name)
    assert module.PAGE.read_text() == module.page(), f"run python docs/{name}.py"


def test_tables_of_claims_are_those_of_their_records():
    for page, text in _script("reproduced").pages().items():
        assert page.read_text() == text, "run python docs/reproduced.py"


def test_the_tree_is_that_of_the_package():
    tree = _script("tree")
    for page, lines in tree.pages().items():
        assert page.read_text() == tree.rewritten(page, lines), "run python docs/tree.py"


def test_the_page_on_config_has_every_key():
    listed = re.findall(r"^\| `([a-z_.]+)`", (DOCS / "config.md").read_text(), re.MULTILINE)
    assert sorted(listed) == config.known_keys()


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_keys_in_pages_exist(page):
    known = {*config.known_keys(), *config.sections()}
    for key in re.findall(r"(?<![\w./])config\.([a-z]\w*(?:\.[a-z]\w*)*)", page.read_text()):
        section = key.rpartition(".")[0]
        file = key.endswith((".py", ".md", "json")) or key in {"json", "py", "md"}
        assert file or key in known or section in OPEN, f"{page.name}: config.{key}"


# Sections that pass on what they do not list.
OPEN = {"model", "method", "method.distribution", "method.structure", "optimizer"}
_SOURCES = [*PAGES, *sorted((ROOT / "configs").glob("*.py"))]


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # of ml_collections
@pytest.mark.parametrize("page", _SOURCES, ids=_name)
def test_commands_are_accepted(page, monkeypatch):
    def check(body, argv, about, define=None, *, with_recipe=False):
        values = command_line.parse(argv, define, with_recipe=with_recipe)
        if with_recipe:
            command_line.checked(values)
        return 0

    monkeypatch.setattr(command_line, "run", check)
    text = re.sub(r"\\\n\s*", " ", page.read_text())
    for command in re.findall(r"rigl-optax (\w+ [^\n`|]*)", text):
        if "--workdir=" in command or command.startswith("explain "):
            quote = "'" * (command.count("'") % 2)  # that closes the command of another program
            command = command.replace("--process_id=i", "--process_id=0")
            words = shlex.split(command.removesuffix(quote), comments=True)
            assert rigl_optax_cli.main([word for word in words if word != "&"]) == 0


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_links_between_pages_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_page_is_on_the_site():
    pages = {str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md")}
    navigation = (ROOT / "mkdocs.yml").read_text().partition("nav:")[2]
    assert set(re.findall(r"- (?:[\w ]+: )?([\w/]+\.md)", navigation)) == pages
    linked = re.findall(r"\]\(([\w/]+\.md)\)", (DOCS / "index.md").read_text())
    assert {page for page in pages if "/" not in page} - {"index.md"} <= set(linked)


def _referenced():
    for page in sorted((DOCS / "reference").glob("*.md")):
        for shown in page.read_text().split("\n::: ")[1:]:
            name = shown.split()[0]
            yield name
            listed = re.search(r"members: \[(.*)\]|members:\n((?: +- \w+\n?)+)", shown)
            for member in re.findall(r"\w+", listed.group(0))[1:] if listed else ():
                yield f"{name}.{member}"


def test_every_public_name_is_in_the_reference():
    modules = {"accounting", "analysis", "condensed", "export"}
    listed = set(_referenced())
    missing = {name for name in rigl_optax.__all__ if f"rigl_optax.{name}" not in listed}
    assert missing <= modules, "add them to a page of docs/reference"
    assert {f"rigl_optax.{name}" for name in modules} <= listed


@pytest.mark.parametrize("name", list(_referenced()))
def test_what_the_reference_shows_exists(name):
    module, _, attribute = name.rpartition(".")
    assert hasattr(importlib.import_module(module), attribute) or importlib.import_module(name)


def test_the_method_of_the_page_is_ours():
    """The code of docs/write_a_method.md trains as `rigl_optax.mest` does."""
    page = (ROOT / "docs" / "write_a_method.md").read_text()
    found: dict = {}
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(compile(block, "write_a_method.md", "exec"), found)
    rng = np.random.default_rng(0)
    params, grads = ({"a": rng.standard_normal((17, 12)).astype(np.float32)} for _ in range(2))
    assert int(found["tx"].update(grads, found["tx"].init(params), params)[1].rewirings) == 1
    keys = {"sparsity": 0.5, "end": 5, "every": 2, "gradient_weight": 0.3, "seed": 4}
    masks = []
    for make in (found["mest"], rigl_optax.mest):
        tx = make(optax.sgd(0.1), **keys)
        state = tx.init(params)
        for _ in range(4):
            _, state = tx.update(grads, state, params)
        masks.append(np.asarray(state.masks["a"]))
    np.testing.assert_array_equal(*masks)


def test_the_example_in_the_readme_runs():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})
