"""Writes the tables of reproduced claims into docs/results.md and README.md, draws their figures.

python docs/reproduced.py
"""

import functools
import io
import pathlib

from rich.console import Console

from rigl_optax.reports.reproduce import claims, page, picture, trials

ROOT = pathlib.Path(__file__).parents[1]
RECORDS = ROOT / "results" / "reproduce"
IMAGES = ROOT / "docs" / "images"
HEADLINE = "methods"  # the claim whose first table is the README's
END = "<!-- end -->\n"


def begin(name: str) -> str:
    """The mark before the lines of a claim."""
    return (
        f"<!-- `python docs/reproduced.py` writes these lines from results/reproduce/{name} -->\n"
    )


@functools.cache
def found(name: str) -> dict[claims.Experiment, trials.Found]:
    """The runs of a claim that have records; experiments without any are left out."""
    silent = Console(file=io.StringIO())
    read = {
        each: trials.find(each, pathlib.Path(), RECORDS / name / each.task, silent, train=False)
        for each in claims.find(name).experiments
    }
    return {each: one for each, one in read.items() if any(one.results.values())}


def pages() -> dict[pathlib.Path, str]:
    """The pages with the tables of the records there are."""
    results, readme = ROOT / "docs" / "results.md", ROOT / "README.md"
    text = results.read_text()
    for name in claims.CLAIMS:
        text = _between(text, name, _lines(name))
    first, one = next(iter(found(HEADLINE).items()))
    rows = page.rows(first, one)
    table = "\n".join(page.scores(rows))
    lines = f"Mean ± standard deviation of {page.seeds(rows)}:\n\n{table}\n"
    return {results: text, readme: _between(readme.read_text(), HEADLINE, lines)}


def _lines(name: str) -> str:
    """What the paper says, and the tables and the figure of the runs, if there are any."""
    claim = claims.find(name)
    paper = f"\nThe paper: {claim.paper}\n\n"
    if not found(name):
        each = (f"{len(one.arms)} arms on {one.task}" for one in claim.experiments)
        return f"{paper}No runs so far: `rigl-optax reproduce {name}` trains {', '.join(each)}.\n\n"
    return f"{paper}{page.table(found(name))}\n![{claim.title}](images/reproduce_{name}.png)\n\n"


def _between(text: str, name: str, lines: str) -> str:
    before, mark, rest = text.partition(begin(name))
    if not mark:
        raise ValueError(f"no line {begin(name).strip()}")
    return before + mark + lines + END + rest.partition(END)[2]


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text)
    for name in claims.CLAIMS:
        if found(name):
            picture.draw(found(name), IMAGES / f"reproduce_{name}.png")
