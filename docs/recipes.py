"""Writes the table of docs/recipes.md from the files of configs/: python docs/recipes.py."""

import ast
import pathlib
import runpy

from rigl_optax.training import config

ROOT = pathlib.Path(__file__).parents[1]
PAGE = ROOT / "docs" / "recipes.md"
BEGIN, END = "<!-- `python docs/recipes.py` writes these lines -->\n", "<!-- end -->"


def page() -> str:
    """The page, with a row for each recipe."""
    before, _, rest = PAGE.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    lines = ["| recipe | what it trains | method |", "|---|---|---|"]
    for path in sorted((ROOT / "configs").glob("*.py")):
        about = ast.get_docstring(ast.parse(path.read_text())).split("\n")[0].rstrip(".")
        made = runpy.run_path(str(path))["get_config"]().to_dict()
        method = config.from_mapping(made).method
        lines.append(
            f"| `{path.stem}` | {about} | {method.name} at "
            f"{100 * method.sparsity:g} %, {method.distribution.name} |"
        )
    return f"{before}{BEGIN}" + "\n".join(lines) + f"\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(page())
