"""Outputs with nodes that share memory with other tensors: views of weights, above all.

Behind a node, autograd does not know a view for one: a write into it, or into what it is a view of, would
change the values of both and the history of one. So writes go to the view as the op returned it, and
what the user holds then takes on the history that autograd gave that one.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from types import NoneType
from typing import Any

import torch
from torch import Tensor

from gramjd.errors import NotCoveredError
from gramjd.internals import base_of, memory_of, version_kept, version_of
from gramjd.uses.tracker import first_argument, is_inplace

_SETTINGS = frozenset({int, bool, float, str, NoneType})

_UNSEEN = (
    "A tensor of shape {} that is computed from parameters, or a view of it, was written in place by what "
    "Python code does not see: a compiled function, an op of C++ (on torch 2.1 also an index of integers and "
    "slices). Gradients would miss this. Write into a clone, tensor.clone(), or outside of that op."
)


class _Renewed(torch.autograd.Function):
    """Gives a tensor the history of another one of the same values, or an error in the place of one."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, other: Tensor | None, error: str) -> Tensor:
        ctx.error = error
        ctx.mark_dirty(tensor)
        return tensor

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        if ctx.error:
            raise RuntimeError(ctx.error)
        return None, grad, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, other: Tensor | None, error: None) -> Any:
        return tangent if other is None else other.view_as(other)


class Aliases:
    """The tensors with nodes, by the memory that they share; keeps them alive, as its recorder does."""

    def __init__(self) -> None:
        self.groups: dict[int, list[tuple[Tensor, Tensor]]] = {}  # with a node, as the op returned it
        self.originals: dict[int, Tensor] = {}  # of those with a node, by id
        self.stale: dict[int, Tensor] = {}  # the same of those that were written into: no longer followed
        self.versions: dict[int, int] = {}  # of each memory: writes into it that were seen, or came before

    def add(self, marked: Tensor, original: Tensor) -> None:
        """Remember a tensor with a node, and the same without."""
        memory = memory_of(marked)
        group = self.groups.setdefault(memory, [])
        group.append((marked, original))
        if len(group) <= 2:  # of one alone, autograd knows the history whatever wrote into it
            self.versions[memory] = version_of(marked)
        if marked is not original:
            self.originals[id(marked)] = original

    def call(self, op: Callable[..., Any], args: Any, kwargs: Any, out: Any) -> Any:
        """Call an op that returns views on the tensors without nodes, because autograd knows their views."""
        for value in (*args, *kwargs.values()):
            if id(value) in self.originals or isinstance(value, (list, tuple, dict)):
                mine, named = replaced(args, self.originals), replaced(kwargs, self.originals)
                return out if mine is args and named is kwargs else op(*mine, **named)
        return out

    def of(self, target: Tensor) -> list[tuple[Tensor, Tensor]]:
        """The tensors that share a tensor's memory, each with its original."""
        return self.groups.get(memory_of(target), [])

    def refuse_unseen_writes(self, target: Tensor | None = None) -> None:
        """Raise where tensors that share memory were written into by what no mode sees.

        Or are about to be: the ``target`` of a write may be a view that no mode saw.

        Raises:
            NotCoveredError: the history of some is not that of their values, in the user's graph either.
        """
        base = None if target is None else base_of(target)
        for memory, group in self.groups.items():
            if len(group) == 1:  # autograd knows the history of the only one
                continue
            unseen_view = any(base is marked is not original for marked, original in group)
            if unseen_view or version_of(group[0][0]) != self.versions[memory]:
                self.groups.clear()  # or the end of the call would raise it again
                raise NotCoveredError(_UNSEEN.format(list(group[0][0].shape)))

    def renew(self, group: list[tuple[Tensor, Tensor]]) -> None:
        """Give all tensors of a group the history that autograd knows, after a write into one of them."""
        self.versions[memory_of(group[0][0])] = version_of(group[0][0])
        if not torch.is_grad_enabled():
            return
        for marked, original in group:
            if marked is original:
                continue
            error = ""
            try:  # views of which there are several from one op refuse, as they do without us
                live = original.requires_grad and original.grad_fn is not None
            except RuntimeError as refusal:
                live, error = True, str(refusal)
            if live:
                with version_kept(marked):  # nothing is written, and autograd counts writes
                    _Renewed.apply(marked, None if error else original, error)


def replaced(tree: Any, others: dict[int, Tensor]) -> Any:
    """Arguments with some tensors replaced by others; themselves, if there are none of these."""
    if isinstance(tree, Tensor):
        return others.get(id(tree), tree)
    if isinstance(tree, dict):
        values = replaced([*tree.values()], others)
        return dict(zip(tree, values, strict=True)) if differ(values, tree.values()) else tree
    if type(tree) in (list, tuple):
        found = [value if type(value) in _SETTINGS else replaced(value, others) for value in tree]
        return type(tree)(found) if differ(found, tree) else tree
    return tree


def differ(one: Iterable[Any], other: Iterable[Any]) -> bool:
    """Whether two lists do not have the same objects."""
    return [*map(id, one)] != [*map(id, other)]


def written(func: Callable[..., Any], args: Any, kwargs: Any) -> Tensor | None:
    """The tensor that an op is asked to write into, if there is one."""
    if func is Tensor.__setitem__ or is_inplace(func) or kwargs.get("inplace") or _is_asked_to(func, args):
        target = first_argument(args, kwargs)
    else:
        target = kwargs.get("out")
    return target if isinstance(target, Tensor) else None


@functools.lru_cache(maxsize=4096)
def may_write(func: Callable[..., Any]) -> bool:
    """Whether an op writes into its first argument, or can be told to by position."""
    return func is Tensor.__setitem__ or is_inplace(func) or _place_of_inplace(func) is not None


def _is_asked_to(func: Any, args: Any) -> bool:
    """Whether ``inplace=True`` is among the positional arguments."""
    for place, arg in enumerate(args):  # noqa: SIM110 - a generator takes a call for each
        if arg is True and place == _place_of_inplace(func):
            return True
    return False


@functools.lru_cache(maxsize=1024)
def _place_of_inplace(func: Any) -> int | None:
    try:
        names = list(inspect.signature(func).parameters)
    except (TypeError, ValueError):  # of C++
        return None
    return names.index("inplace") if "inplace" in names else None
