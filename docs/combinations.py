"""Writes the table of options into docs/methods.md: python docs/combinations.py."""

import pathlib
import sys

ROOT = pathlib.Path(__file__).parent.parent
PAGE = ROOT / "docs" / "methods.md"
BEGIN, END = "<!-- `python docs/combinations.py` writes these lines -->\n", "<!-- end -->\n"


def page() -> str:
    """The page, with the table as the tests have it."""
    sys.path.insert(0, str(ROOT))
    from tests.methods import combinations

    before, _, rest = PAGE.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    table = "\n".join([combinations.legend() + ".", "", *combinations.rows()])
    return f"{before}{BEGIN}{table}\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(page())
