"""Recognises a function when a transform of it is made anew, as ``torch.func``'s idiom does in every step.

``gramjd.gramian(loss)(params, x)`` in a training loop makes a transform a step. What an earlier one verified
holds for the next if the function is the same object, or is made of the same code over the same objects (a
lambda, a nested function, a bound method, a ``partial``). Keys keep nothing alive: they hold weak references.
"""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Callable, Hashable, Iterable
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor

from gramjd import pytree
from gramjd.uses.use import kind

_LARGE = 4096  # leaves of a container beyond which it is not looked through


class Same:
    """An object by its identity, without keeping it alive. Once it is gone, the key equals no other key."""

    __slots__ = ("number", "reference")

    def __init__(self, value: object) -> None:
        self.reference, self.number = weakref.ref(value), id(value)

    def __hash__(self) -> int:
        return self.number

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        mine = self.reference()
        return isinstance(other, Same) and mine is not None and mine is other.reference()


class _Unknown(Exception):
    """An object cannot be recognised again."""


def identity(function: Callable[..., Any]) -> Hashable | None:
    """A key that is equal for two functions that do the same; ``None`` if nothing tells."""
    try:
        return _of(function, ())
    except _Unknown:
        pass
    try:
        return Same(function)
    except TypeError:  # no weak reference can be made
        return None


def _of(value: Any, inside: tuple[int, ...]) -> Hashable:
    """The key of a function, or of what it refers to; ``inside``: the ids of the objects that led there."""
    if id(value) in inside:
        return "itself", inside.index(id(value))
    inside = (*inside, id(value))
    if isinstance(value, FunctionType):
        return _of_function(value, inside)
    if isinstance(value, MethodType):
        return "method", _of(value.__func__, inside), _same(value.__self__)
    if isinstance(value, functools.partial):
        keywords = sorted(value.keywords.items())
        return "partial", _of(value.func, inside), _all(value.args, inside), *_named(keywords, inside)
    if type(value) in (tuple, list, dict):
        leaves, spec = pytree.flatten(value)
        if len(leaves) > _LARGE:
            raise _Unknown
        return str(spec), _all(leaves, inside)
    # of tensors and floats the kind alone, as among the arguments: no rule depends on their values
    if value is None or isinstance(value, (Tensor, bool, int, float, str, torch.dtype, torch.device)):
        return kind(value)
    return _same(value)


def _of_function(function: FunctionType, inside: tuple[int, ...]) -> Hashable:
    module = sys.modules.get(function.__module__)
    if module is None or vars(module) is not function.__globals__:
        raise _Unknown
    cells = []
    for cell in function.__closure__ or ():
        try:
            cells.append(cell.cell_contents)
        except ValueError:  # not assigned yet
            raise _Unknown from None
    keywords = sorted((function.__kwdefaults__ or {}).items())
    return (
        Same(function.__code__),
        Same(module),
        _all(function.__defaults__ or (), inside),
        *_named(keywords, inside),
        _all(cells, inside),
    )


def _all(values: Iterable[Any], inside: tuple[int, ...]) -> Hashable:
    return tuple([_of(value, inside) for value in values])


def _named(items: Iterable[tuple[str, Any]], inside: tuple[int, ...]) -> Iterable[Hashable]:
    return [(name, _of(value, inside)) for name, value in items]


def _same(value: object) -> Same:
    try:
        return Same(value)
    except TypeError:
        raise _Unknown from None
