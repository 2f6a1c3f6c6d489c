"""For `make docs`: signatures show a default as `Grown()` where the source names a constant."""

from typing import Any

import griffe


class Defaults(griffe.Extension):
    """Puts the values of constants in the place of their names in the defaults of parameters."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        """Visits the functions and classes of a package that has been read."""
        del kwargs
        self._visit(pkg)

    def _visit(self, scope: griffe.Module | griffe.Class) -> None:
        for member in list(scope.members.values()):
            if member.is_alias:
                continue
            if member.is_function:
                _show_defaults(member)
            if member.is_class:
                for parameter in getattr(member, "parameters", ()):
                    parameter.default = _value(member, parameter.default)
            if member.is_module or member.is_class:
                self._visit(member)


def _show_defaults(function: griffe.Function) -> None:
    for parameter in function.parameters:
        parameter.default = _value(function, parameter.default)


def _value(owner: griffe.Object, default: Any) -> Any:
    """Returns the value that a constant is given in its module, or the default as it is."""
    name = str(default)
    if not name.replace(".", "").isidentifier() or not name.rpartition(".")[2].isupper():
        return default
    try:
        found = owner.modules_collection[default.canonical_path]
    except (KeyError, griffe.NameResolutionError):
        return default
    value = getattr(found.final_target if found.is_alias else found, "value", None)
    return default if value is None else str(value)
