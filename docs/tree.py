"""Writes the package's tree into CONTRIBUTING.md and docs/design.md: python docs/tree.py.

Each line is the first line of a docstring.
"""

import ast
import pathlib
from collections.abc import Iterator

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "rigl_optax"
BEGIN, END = "<!-- `python docs/tree.py` writes these lines -->\n", "<!-- end -->"
# Of the packages that depend on JAX and Optax alone, design.md shows every module.
CORE = ("", "_ranking", "_wrapper", "_xla", "methods", "condensed", "export")


def pages() -> dict[pathlib.Path, str]:
    """The pages with the tree as it is now."""
    return {
        ROOT / "CONTRIBUTING.md": _packages(),
        ROOT / "docs" / "design.md": _modules(),
    }


def rewritten(page: pathlib.Path, lines: str) -> str:
    """The page with other lines between the two marks."""
    before, _, rest = page.read_text().partition(BEGIN)
    return f"{before}{BEGIN}{lines}{END}{rest.partition(END)[2]}"


def _packages() -> str:
    """A line for each package."""
    rows = [(name, _about(PACKAGE / name / "__init__.py")) for name in _folders()]
    return "```\n" + "\n".join(_tree(rows)) + "\n```\n"


def _tree(rows: list[tuple[str, str]]) -> Iterator[str]:
    shown = {name: "  " * name.count("/") + name.rpartition("/")[2] + "/" for name, _ in rows}
    width = max(len(text) for text in shown.values()) + 2
    yield "rigl_optax/"
    for name, about in rows:
        yield f"  {shown[name]:<{width}}{about}".rstrip()


def _folders() -> list[str]:
    inits = PACKAGE.rglob("__init__.py")
    names = (str(path.parent.relative_to(PACKAGE)) for path in inits)
    return sorted(name for name in names if name != ".")


def _modules() -> str:
    """A table of the core's modules, package by package."""
    lines = []
    for folder in CORE:
        files = sorted((PACKAGE / folder).glob("*.py"))
        inside = [path for path in files if path.name != "__init__.py"]
        if not inside:
            continue
        title = f"`{folder}/`" if folder else "The package itself"
        about = f": {_about(PACKAGE / folder / '__init__.py')}" if folder else ""
        lines += [f"**{title}**{about}", "", "| module | |", "|---|---|"]
        for path in inside:
            lines.append(f"| `{path.stem}` | {_about(path).replace('|', '&#124;')} |")
        lines.append("")
    return "\n".join(lines)


def _about(path: pathlib.Path) -> str:
    """The first line of a module's docstring."""
    return (ast.get_docstring(ast.parse(path.read_text())) or "").split("\n")[0].strip()


if __name__ == "__main__":
    for page, lines in pages().items():
        page.write_text(rewritten(page, lines))
