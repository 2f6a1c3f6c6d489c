"""Examples in docstrings and code blocks of pages run, and print what they say.

Examples are found in the sources, not through imported objects: `doctest` looks past whatever is no
plain function, as `jax.custom_vjp` makes it.
"""

import ast
import doctest
import importlib
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[2]
MODULES = sorted(path for path in (ROOT / "rigl_optax").rglob("*.py") if ">>> " in path.read_text())


def examples(path):
    """The examples of each docstring, as doctests that see the names of their module."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):
            continue
        text = node.value.value
        if isinstance(text, str) and ">>> " in text:
            name, line = f"{path.stem}:{node.lineno}", node.lineno - 1
            found.append(doctest.DocTestParser().get_doctest(text, {}, name, str(path), line))
    return found


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_examples_in_docstrings_print_what_they_say(path):
    tests = examples(path)
    lines = re.findall(r"^\s*>>> ", path.read_text(), re.MULTILINE)
    assert sum(len(test.examples) for test in tests) == len(lines)
    names = vars(importlib.import_module(module_name(path)))
    for test in tests:
        test.globs = dict(names)
        runner, printed = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS), []
        assert runner.run(test, out=printed.append).failed == 0, "".join(printed)


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FRAGMENT = "<!-- a fragment"


def blocks(page):
    """The blocks of Python of a page, and whether each is marked as one that cannot run alone."""
    text = page.read_text()
    found = re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [
        (match.group(1), text[: match.start()].rstrip().split("\n")[-1].startswith(FRAGMENT))
        for match in found
    ]


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p)], ids=lambda page: page.name)
def test_code_in_pages_runs(page, capsys):
    """In order, in one namespace; fragments, which the page marks, are only parsed."""
    names = {"__name__": page.stem}
    for number, (code, is_fragment) in enumerate(blocks(page), 1):
        compiled = compile(code, f"{page.name}, block {number}", "exec")
        if not is_fragment:
            exec(compiled, names)
            printed = capsys.readouterr().out
            for line in re.findall(r"^# (healed == .*)$", code, re.MULTILINE):
                assert line in printed, f"it prints {printed!r}"
