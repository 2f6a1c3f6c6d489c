"""Writes one HTML page about a run, finished or not. It has no script and loads nothing."""

import html
import math
import pathlib
import re
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from rigl_optax.reports import page_figures
from rigl_optax.reports.charts import Record
from rigl_optax.training import checkpoints, files, loading, loop, metrics, score
from rigl_optax.training import config as config_lib

# The policy makes the browser refuse scripts and any request.
_HEAD = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<title>{title}</title>
<style>
body {{ font: 15px/1.5 sans-serif; color: #222; background: #fff; max-width: 1020px;
  margin: 2em auto; padding: 0 1em; }}
h1 {{ font-size: 1.5em; margin-bottom: 0; }}
h2 {{ font-size: 1.15em; margin: 2em 0 .5em; border-bottom: 1px solid #ddd; }}
p {{ margin: .4em 0; }}
.facts {{ display: flex; flex-wrap: wrap; gap: .6em; margin: 1em 0; }}
.facts div {{ border: 1px solid #ddd; border-radius: 6px; padding: .4em .9em; }}
.facts b {{ display: block; font-size: 1.25em; }}
.warning {{ background: #fff4d6; border-left: 4px solid #e69f00; padding: .3em .8em; }}
.scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-size: .93em; font-variant-numeric: tabular-nums; }}
td, th {{ padding: .15em .6em; text-align: right; border-bottom: 1px solid #eee;
  white-space: nowrap; }}
td.text, th.text {{ text-align: left; }}
figure {{ margin: .5em 0 1.5em; }}
figure svg {{ width: 100%; height: auto; }}
figcaption, .note {{ color: #555; font-size: .93em; }}
</style>
</head>
<body>
"""


def write(workdir: pathlib.Path, output: pathlib.Path, which: str = loading.NEWEST) -> None:
    """Writes the page of a run, also while it trains.

    Args:
      workdir: The workdir of the run.
      output: The HTML file.
      which: The checkpoint whose masks are shown, as in `rigl_optax.training.load`.

    Raises:
      ValueError: If there is no run in the workdir, or its files are damaged.
    """
    text = render(workdir, which)
    with files.replacing(output) as file:
        file.write(text.encode())


def render(workdir: pathlib.Path, which: str = loading.NEWEST) -> str:
    """Renders the page of a run as HTML; raises as `write` does."""
    config = config_lib.from_mapping(checkpoints.read_config(workdir))
    records = metrics.read(workdir / metrics.FILE)
    explained = _read(
        workdir / loop.EXPLANATION_FILE, "the explanation of a run", files.EXPLANATION
    )
    result = _read(workdir / checkpoints.RESULT_FILE, "the result of a run", files.RESULT)
    sparse = f"{100 * config.method.sparsity:g} % sparse " if explained.get("weights") else ""
    title = f"{config.method.name}: {sparse}{config.model.name} on {config.data.name}"
    warnings = [*explained.get("warnings", ()), *result.get("warnings", ())]
    keys = [[key, str(value)] for key, value in config_lib.flat(config_lib.to_json(config)).items()]
    return "\n".join(
        [
            _HEAD.format(title=_text(title)),
            f"<h1>{_text(title)}</h1>",
            _progress(config, records, result),
            _facts(records, explained, result),
            *(f'<p class="warning">{_text(warning)}</p>' for warning in warnings),
            "<h2>Training</h2>",
            *map(_figure, page_figures.training(records)),
            "<h2>Layers</h2>",
            _layers(explained, records),
            _parts(records),
            "<h2>Topology</h2>",
            *map(_figure, page_figures.topology(records)),
            *map(_figure, page_figures.masks(workdir, config, which)),
            "<h2>Config</h2>",
            _table(["key", "value"], keys, texts=2),
            "</body>\n</html>\n",
        ]
    )


def _read(path: pathlib.Path, what: str, form: files.Form) -> dict[str, Any]:
    """Reads a JSON object; an empty one if there is no file."""
    return files.read(path, what, form) if path.exists() else {}


def _text(text: object) -> str:
    """Escapes text for HTML."""
    return html.escape(str(text))


def _progress(config: config_lib.Config, records: list[Record], result: dict[str, Any]) -> str:
    """Says how far the run has come."""
    done = max((record["step"] for record in records), default=0)
    state = "finished" if result and done == config.steps else "not finished"
    return f'<p class="note">step {done:,} of {config.steps:,}, {state}</p>'


def _facts(records: list[Record], explained: dict[str, Any], result: dict[str, Any]) -> str:
    """Lists the few numbers to read first."""
    facts = []
    validation = [record for record in records if record["kind"] == "validation"]
    if result:
        facts.append(_fact("test", result["test"]))
    if validation:
        facts.append(_fact("validation", validation[-1]))
    if explained.get("weights"):
        prunes = explained["active_at_end"] != explained["active"]
        when = " when training ends" if prunes else ""
        what = f"of {explained['weights']:,} weights active{when}"
        facts.append((f"{explained['active_at_end']:,}", what))
    if explained.get("inference_ratio") is not None:
        facts.append((f"{explained['inference_ratio']:.4f}", "of dense inference FLOPs"))
    if explained.get("training_ratio") is not None:
        facts.append((f"{explained['training_ratio']:.4f}", "of dense training FLOPs"))
    if records and "training_flops" in records[-1]:
        facts.append((f"{records[-1]['training_flops']:.3g}", "training FLOPs so far"))
    inside = "".join(f"<div><b>{_text(n)}</b>{_text(what)}</div>" for n, what in facts)
    return f'<div class="facts">{inside}</div>' if facts else ""


def _fact(split: str, measured: dict[str, Any]) -> tuple[str, str]:
    """Returns the score on a split, and what it is."""
    judged = score.of(measured)
    return f"{judged.number(judged.value(measured))} {judged.unit}".rstrip(), (
        f"{split} {judged.label}"
    )


def _figure(figure: page_figures.Figure) -> str:
    """Lays out a figure and its note; the note alone if there is no picture."""
    name, note = _text(figure.name), _text(figure.note)
    if not figure.svg:
        return f'<p id="{name}" class="note">{note}</p>'
    return f'<figure id="{name}">{figure.svg}<figcaption>{note}</figcaption></figure>'


def _layers(explained: dict[str, Any], records: list[Record]) -> str:
    """Tabulates each layer: its explanation, and the measures of the last rewiring."""
    if not explained:
        return '<p class="note">This run has kept no explanation of its layers.</p>'
    last = _last_rewiring(records)
    measures: list[tuple[str, str, str, Callable[[Sequence[float]], float]]] = [
        ("coverage", "coverage", "{:.1%}", statistics.mean),
        ("overlap", "overlap", "{:.1%}", statistics.mean),
        ("dead_inputs", "dead inputs", "{:.0f}", sum),
        ("dead_outputs", "dead outputs", "{:.0f}", sum),
    ]
    prunes = explained["active_at_end"] != explained["active"]
    active = "active at the end" if prunes else "active"
    header = ["layer", "shape", "dense because", "sparsity", active, "of", "FLOPs"]
    rows = []
    for layer in explained["layers"]:
        path, size, left = layer["path"], math.prod(layer["shape"]), layer["active_at_end"]
        row = [path, "x".join(map(str, layer["shape"])) or "scalar", layer["dense_because"] or ""]
        row.append("dense" if left == size or not size else f"{1 - left / size:.4f}")
        row += [f"{left:,}", f"{size:,}", f"{layer['flops_share'] or 0:.1%}"]
        if last:
            for name, _, form, combine in measures:
                # A leaf may be a stack of layers, of one size and sparsity: path/0, path/1, ...
                key = re.compile(rf"{name}/{re.escape(path)}(/\d+)?")
                values = [value for other, value in last.items() if key.fullmatch(other)]
                row.append(form.format(combine(values)) if values else "")
        rows.append(row)
    if last:
        header += [name for _, name, _, _ in measures]
    return _table(header, rows, texts=3)


def _parts(records: list[Record]) -> str:
    """Tabulates what the last rewiring has left of each attention and MLP; nothing if none is."""
    last = _last_rewiring(records)
    measures = ("dead_heads", "averaging_heads", "dead_units")
    paths = dict.fromkeys(
        path for name, _, path in (key.partition("/") for key in last) if name in measures
    )
    if not paths:
        return ""
    rows = []
    for path in paths:
        values = [last.get(f"{name}/{path}") for name in measures]
        rows.append([path, *("" if value is None else f"{value:.0f}" for value in values)])
    header = ["attention or MLP", *(name.replace("_", " ") for name in measures)]
    return _table(header, rows, texts=1)


def _last_rewiring(records: list[Record]) -> Record:
    """Returns the record of the last rewiring; an empty one if there is none."""
    return next((r for r in reversed(records) if r["kind"] == "rewiring"), {})


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], *, texts: int) -> str:
    """Lays out a table; the first `texts` columns are words, the others numbers."""

    def line(tag: str, cells: Sequence[str]) -> str:
        kinds = [' class="text"' if i < texts else "" for i in range(len(cells))]
        inside = "".join(
            f"<{tag}{kind}>{_text(cell)}</{tag}>" for kind, cell in zip(kinds, cells, strict=True)
        )
        return f"<tr>{inside}</tr>"

    body = "\n".join(line("td", row) for row in rows)
    return f'<div class="scroll"><table>\n{line("th", header)}\n{body}\n</table></div>'
