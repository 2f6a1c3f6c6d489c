"""JSON files of a run: written at once, and read back with the kind of every value checked."""

import contextlib
import json
import os
import pathlib
from collections.abc import Iterator
from typing import IO, Any, TypeAlias

# What a value must be: one of some types; [form], a list of such; {name: form}, an object with
# these names at least; {str: form}, an object of such under any names.
Form: TypeAlias = Any
NUMBER = (int, float)
TEXT = (str,)
_NUMBERS = {str: NUMBER}
RESULT: Form = {
    "config": {},
    "validation": _NUMBERS | {"accuracy": NUMBER, "loss": NUMBER},
    "test": _NUMBERS | {"accuracy": NUMBER, "loss": NUMBER},
    "active_weights": {str: (int,)},
    "weights": (int,),
    "flops": dict.fromkeys(("training", "training_dense", "inference", "inference_dense"), NUMBER),
    "coverage": (*NUMBER, type(None)),
    "warnings": [TEXT],
}
_LAYER: Form = {
    "path": TEXT,
    "shape": [(int,)],
    "dense_because": (str, type(None)),
    "sparsity": (*NUMBER, type(None)),
    "active": (int,),
    "active_at_end": (int,),
    "flops_share": (*NUMBER, type(None)),
}
EXPLANATION: Form = {
    "layers": [_LAYER],
    "weights": (int,),
    "active": (int,),
    "active_at_end": (int,),
    "inference_ratio": (*NUMBER, type(None)),
    "training_ratio": (*NUMBER, type(None)),
    "warnings": [TEXT],
}
RECORD: Form = {"step": (int,), "kind": TEXT, str: (*NUMBER, str)}


def write(path: pathlib.Path, value: Any) -> None:
    """Writes a JSON file atomically, as `replacing` does."""
    with replacing(path) as file:
        file.write(json.dumps(value, indent=2, allow_nan=False).encode() + b"\n")


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[IO[bytes]]:
    """Opens a temporary file that replaces `path` when the block ends without an error.

    A reader sees the old content or the new one, also after a crash or a power cut.

    Args:
      path: The file to write.

    Yields:
      The temporary file, beside `path`.
    """
    temporary = path.with_name(path.name + ".tmp")
    temporary.unlink(missing_ok=True)  # it may be a link to something else
    with temporary.open("xb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    # Without this the new name could be lost in a power cut.
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def read(path: pathlib.Path, what: str, form: Form) -> dict[str, Any]:
    """Reads a JSON object from a file.

    Args:
      path: The file.
      what: For the error: what it should be, as `the config of a run`.
      form: What the object must be.

    Raises:
      ValueError: If the file is not there, not JSON, or not of that form; it says where.
    """
    try:
        return parse(path.read_text(), form)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not {what} ({error})") from error


def parse(text: str, form: Form) -> dict[str, Any]:
    """Parses a JSON object; raises a ValueError that says what is wrong with it."""
    try:
        value = json.loads(text, parse_constant=_refuse)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if problem := _problem(value, form, "it"):
        raise ValueError(problem)
    return dict(value)


def _refuse(constant: str) -> None:
    """Refuses NaN and Infinity, which Python's parser takes and JSON does not have."""
    raise ValueError(f"{constant} is no JSON")


def _problem(value: Any, form: Form, where: str) -> str | None:
    """Says what is wrong with a value; None if nothing."""
    if isinstance(form, tuple):
        if type(value) in form and not (type(value) is int and abs(value) >= 2**63):
            return None
        names = " or ".join("null" if t is type(None) else t.__name__ for t in form)
        return f"{where} is {_shown(value)}, not {names}"
    if isinstance(form, list):
        if not isinstance(value, list):
            return f"{where} is {_shown(value)}, not a list"
        inside = ((item, form[0], f"{where}[{i}]") for i, item in enumerate(value))
    else:
        if not isinstance(value, dict):
            return f"{where} is {_shown(value)}, not an object"
        missing = [name for name in form if name is not str and name not in value]
        if missing:
            return f"{where} has no {missing[0]!r}"
        forms = {name: form.get(name, form.get(str)) for name in value}
        inside = ((value[n], f, f"{where}[{n!r}]") for n, f in forms.items() if f is not None)
    return next((p for p in (_problem(*item) for item in inside) if p is not None), None)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}..."
