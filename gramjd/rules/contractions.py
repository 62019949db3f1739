"""``tensordot``, ``inner``, ``outer`` and ``vecdot`` of a weight and one other operand, as einsums."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from string import ascii_letters
from typing import Any

import torch
from torch import Tensor

from gramjd.blocks import Outer
from gramjd.rules.einsum import is_outer, outer_of
from gramjd.rules.registry import register_rule

OUTERS = (torch.outer, torch.ger, Tensor.outer, Tensor.ger)
INNERS = (torch.inner, Tensor.inner)
Subscripts = tuple[str, str, str]  # of both operands and the output


def _tensordot(left: int, right: int, dims: Any = 2) -> Subscripts:
    """Of operands that have so many dimensions."""
    if not isinstance(dims, (int, tuple, list)) or isinstance(dims, torch.Size):
        raise ValueError("tensordot has its dims in a tensor")  # whose size it may be
    pairs = (range(left - dims, left), range(dims)) if isinstance(dims, int) else dims
    ours, theirs = ascii_letters[:left], list(ascii_letters[left : left + right])
    first, second = ([dim % rank for dim in mine] for mine, rank in zip(pairs, (left, right), strict=True))
    for mine, other in zip(first, second, strict=True):
        theirs[other] = ours[mine]
    out = [x for dim, x in enumerate(ours) if dim not in first]
    out += [x for dim, x in enumerate(theirs) if dim not in second]
    return ours, "".join(theirs), "".join(out)


def _outer(left: int, right: int) -> Subscripts:
    return "a", "b", "ab"


def _inner(left: int, right: int) -> Subscripts:
    if not left or not right:  # a number
        return ascii_letters[:left], ascii_letters[:right], ascii_letters[: left + right]
    return _tensordot(left, right, ([-1], [-1]))


def _vecdot(left: int, right: int, dim: int = -1) -> Subscripts:
    names = ascii_letters[: max(left, right)]
    along = names[dim]
    return names[len(names) - left :], names[len(names) - right :], names.replace(along, "")


@dataclass(frozen=True)
class _Contraction:
    """The operands of an op, and its subscripts by their numbers of dimensions and its option."""

    names: tuple[str, str]
    subscripts: Callable[..., Subscripts]
    option: str = ""

    def meets(self, arguments: Mapping[Any, Any], name: str, dim: int) -> int | None:
        """The dimension of an operand with the letter of dimension ``dim`` of the output."""
        left, right = (len(arguments[each]) for each in self.names)
        *operands, out = self.subscripts(left, right, **self._options(arguments))
        place = operands[self.names.index(name)].find(out[dim]) if name in self.names else -1
        return place if place >= 0 else None

    def wrt(self, name: str) -> dict[str, Any]:
        """The options of the rule of one operand."""
        (other,) = set(self.names) - {name}

        def covers(arguments: Mapping[Any, Any]) -> bool:
            try:
                left, right = [arguments[each].ndim for each in self.names]
                parts = self._of(name, left, right, self._options(arguments))
                return is_outer(arguments[name], arguments[other], *parts)
            except Exception:  # a call that torch refuses, or that names its arguments otherwise
                return False

        return {"wrt": name, "needs": [other], "align": self.meets, "when": covers}

    def first(self, c: Tensor, weight: Tensor, other: Tensor, **options: Any) -> Outer:
        """The block of the first operand."""
        return outer_of(c, other, weight, *self._of(self.names[0], weight.ndim, other.ndim - 1, options))

    def second(self, c: Tensor, other: Tensor, weight: Tensor, **options: Any) -> Outer:
        """The block of the second operand."""
        return outer_of(c, other, weight, *self._of(self.names[1], other.ndim - 1, weight.ndim, options))

    def _of(self, name: str, left: int, right: int, options: Mapping[str, Any]) -> Subscripts:
        """Subscripts of the weight, of the other operand and of the output."""
        first, second, out = self.subscripts(left, right, **options)
        return (first, second, out) if name == self.names[0] else (second, first, out)

    def _options(self, arguments: Mapping[Any, Any]) -> dict[str, Any]:
        return {self.option: arguments[self.option]} if self.option in arguments else {}


TENSORDOT = _Contraction(("a", "b"), _tensordot, "dims")
INNER = _Contraction(("input", "other"), _inner)
OUTER = _Contraction(("input", "vec2"), _outer)
VECDOT = _Contraction(("x", "y"), _vecdot, "dim")


@register_rule(torch.tensordot, **TENSORDOT.wrt("a"))
def tensordot_first(c: Tensor, a: Tensor, b: Tensor, dims: Any = 2, out: None = None) -> Outer:
    return TENSORDOT.first(c, a, b, dims=dims)


@register_rule(torch.tensordot, **TENSORDOT.wrt("b"))
def tensordot_second(c: Tensor, a: Tensor, b: Tensor, dims: Any = 2, out: None = None) -> Outer:
    return TENSORDOT.second(c, a, b, dims=dims)


@register_rule(*INNERS, **INNER.wrt("input"))
def inner_first(c: Tensor, input: Tensor, other: Tensor) -> Outer:
    return INNER.first(c, input, other)


@register_rule(*INNERS, **INNER.wrt("other"))
def inner_second(c: Tensor, input: Tensor, other: Tensor) -> Outer:
    return INNER.second(c, input, other)


@register_rule(*OUTERS, **OUTER.wrt("input"))
def outer_first(c: Tensor, input: Tensor, vec2: Tensor) -> Outer:
    return OUTER.first(c, input, vec2)


@register_rule(*OUTERS, **OUTER.wrt("vec2"))
def outer_second(c: Tensor, input: Tensor, vec2: Tensor) -> Outer:
    return OUTER.second(c, input, vec2)


@register_rule(torch.linalg.vecdot, **VECDOT.wrt("x"))
def vecdot_first(c: Tensor, x: Tensor, y: Tensor, dim: int = -1) -> Outer:
    return VECDOT.first(c, x, y, dim=dim)


@register_rule(torch.linalg.vecdot, **VECDOT.wrt("y"))
def vecdot_second(c: Tensor, x: Tensor, y: Tensor, dim: int = -1) -> Outer:
    return VECDOT.second(c, x, y, dim=dim)
