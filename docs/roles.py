"""Prepares docstrings and signatures for the reference, where mkdocstrings does not.

The roles of our docstrings, ``:class:`~gramjd.Jacobian```, become links. Aliases of types, and defaults that
are names, are spelled out.
"""

import re
from dataclasses import fields, replace
from typing import Any

import griffe

DEFAULTS = {
    "_NOT_GIVEN": "...",  # must be passed
    "tuple(STRATEGIES)": "('losses', 'ops', 'functional', 'rows')",
}
ROLE = re.compile(r":(?:class|func|meth|mod|data|attr):`(~?)([\w.]+)`")


class Roles(griffe.Extension):
    """Changes every object after griffe has read it."""

    def on_function(self, *, func: griffe.Function, **kwargs: Any) -> None:
        for parameter in func.parameters:
            parameter.annotation = _spelled_out(func.package, parameter.annotation)
            parameter.default = DEFAULTS.get(str(parameter.default), parameter.default)

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = ROLE.sub(lambda match: _link(obj, *match.groups()), obj.docstring.value)


def _link(obj: griffe.Object, short: str, name: str) -> str:
    shown = name.rpartition(".")[2] if short else name
    target = _canonical(obj.package, name) if name.startswith("gramjd.") else _full(obj, name)
    return f"[`{shown}`][{target}]" if _exists(obj.package, target) else f"`{shown}`"


def _exists(package: griffe.Module, path: str) -> bool:
    try:
        return bool(path and package[path.removeprefix("gramjd.")])
    except KeyError:
        return False


def _full(obj: griffe.Object, name: str) -> str:
    """The path of a name in the scope of the docstring; empty if nothing has it."""
    holder = obj if obj.is_class else obj.parent
    if holder is not None and name in holder.members:
        found = holder.members[name]
        return found.target_path if isinstance(found, griffe.Alias) else found.path
    try:
        return _canonical(obj.package, obj.resolve(name))
    except griffe.NameResolutionError:
        return ""


def _canonical(package: griffe.Module, path: str) -> str:
    """The path of a public function whose name is also that of a submodule, such as ``gramjd.jacobian``."""
    holder, _, name = path.rpartition(".")
    module = package["weighting"] if holder == "gramjd.weighting" else package
    return module.imports.get(name, path) if holder == module.path else path


def _spelled_out(package: griffe.Module, shown: Any) -> Any:
    """An annotation with our aliases of types (``Labels``, ``When``, ...) spelled out."""
    if isinstance(shown, griffe.ExprName):
        path = shown.canonical_path
        if not path.startswith("gramjd.") or shown.name == "PyTree":  # which says more than Any
            return shown
        try:
            named = package[path.removeprefix("gramjd.")]
        except KeyError:
            return shown
        named = named.final_target if named.is_alias else named
        return _spelled_out(package, named.value) if named.is_attribute else shown
    if isinstance(shown, griffe.Expr):
        names = [field.name for field in fields(shown) if field.name != "parent"]
        return replace(shown, **{name: _spelled_out(package, getattr(shown, name)) for name in names})
    return [_spelled_out(package, each) for each in shown] if isinstance(shown, list) else shown
