"""Writes the tables of docs/config.md from rigl_optax/training/config.py: python docs/config.py."""

import dataclasses
import inspect
import pathlib
import re
import textwrap
from typing import Any

from rigl_optax.training import config

PAGE = pathlib.Path(__file__).parent / "config.md"
MORE = {
    "data": "[Data](data.md) and [Text](text.md) say what each dataset is.",
    "model": "[Vision](vision.md) and [Text](text.md) list the models, the "
    "[reference](reference/models.md) their arguments.",
    "start": "[Deploy](deploy.md#in-a-run) has examples.",
    "method": "[Methods](methods.md) lists them, the [reference](reference/methods.md) their "
    "arguments.",
    "method.distribution": "The [reference](reference/masks.md) has their arguments.",
    "method.structure": "[Structures](structures.md) says what each means.",
    "mesh": "[Scale](scale.md) has the rest.",
    "checkpoint": "[Crashes](crashes.md) says what is in one.",
    "faults": "[Crashes](crashes.md) has the rest.",
}
BEGIN, END = "<!-- `python docs/config.py` writes these lines -->\n", "<!-- end -->\n"


def page() -> str:
    """The page, with the tables from the dataclasses and their docstrings."""
    before, _, _ = PAGE.read_text().partition(BEGIN)
    lines = ["## Top level", "", *_table(config.Config, "")]
    for section, kind in config._SECTIONS.items():
        about, _ = _docstring(kind)
        if section in MORE:
            about = f"{about}\n\n{MORE[section]}"
        lines += ["", f"## {section}", "", about, "", *_table(kind, f"{section}.")]
    return f"{before}{BEGIN}" + "\n".join(lines) + f"\n{END}"


def keys() -> list[str]:
    """The keys that the page lists, in its order."""
    return re.findall(r"^\| `([a-z_.]+)`", page(), re.MULTILINE)


def _table(kind: Any, prefix: str) -> list[str]:
    lines = ["| key | default | values | meaning |", "|---|---|---|---|"]
    _, meanings = _docstring(kind)
    for field in dataclasses.fields(kind):
        key = prefix + field.name
        if key in config._SECTIONS or field.metadata.get("open"):
            continue
        mark = " ○" if key in config.BOOKKEEPING else ""
        meaning = meanings[field.name].replace("|", "&#124;")
        lines.append(f"| `{key}`{mark} | {_default(field)} | {_values(field)} | {meaning} |")
    return lines


def _default(field: Any) -> str:
    default = field.default
    if default == "":
        return "empty"
    if default == ():
        return "none"
    return f"`{default}`"


def _values(field: Any) -> str:
    allowed, one_of = field.metadata["range"], field.metadata["one_of"]
    if one_of:
        return ", ".join(f"`{word}`" for word in one_of)
    kind = {
        str: "text",
        str | int: "text or integer",
        tuple[str, ...]: "texts",
        bool: "`True`, `False`",
        int: "integer",
        float: "number",
        tuple[int, ...]: "integers",
        tuple[float, ...]: "numbers",
    }.get(field.type, "by pattern")
    return f"{kind} in {allowed.replace('inf', '∞')}" if allowed else kind


def _docstring(kind: Any) -> tuple[str, dict[str, str]]:
    """The text of a class before its attributes, and the meaning of each of them."""
    about, _, attributes = inspect.getdoc(kind).partition("Attributes:\n")
    entries = re.split(r"^(?=\w+:)", textwrap.dedent(attributes), flags=re.MULTILINE)
    pairs = (entry.partition(":") for entry in entries if entry.strip())
    meanings = {name: " ".join(text.split()) for name, _, text in pairs}
    return about.strip(), meanings


if __name__ == "__main__":
    PAGE.write_text(page())
