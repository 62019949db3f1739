"""``torch.einsum`` of a weight and one other operand."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor

from gramjd.blocks import Outer
from gramjd.rules.registry import register_rule

_Arguments = Mapping[Any, Any]


def letters(equation: str, *dims: int) -> tuple[str, ...]:
    """Subscripts of the operands, which have so many dimensions, and of the output; no ellipsis."""
    operands, _, out = equation.replace(" ", "").partition("->")
    given = operands.split(",")
    if "->" not in equation:  # what occurs once, in alphabetical order
        rest = "".join(given).replace(".", "")
        out = ("..." if "..." in equation else "") + "".join(sorted(x for x in rest if rest.count(x) == 1))
    spare = [chr(x) for x in range(ord("a"), ord("z") + 1) if chr(x) not in equation]
    spare += [chr(x).upper() for x in range(ord("a"), ord("z") + 1) if chr(x).upper() not in equation]
    counts = [n - len(s) + 3 if "..." in s else 0 for s, n in zip(given, dims, strict=True)]
    names = "".join(spare[: max(counts)])  # broadcasting aligns the last dimensions
    found = [s.replace("...", names[len(names) - n :]) for s, n in zip(given, counts, strict=True)]
    return *found, out.replace("...", names)


def _meets(arguments: _Arguments, name: str, dim: int) -> int | None:
    """The dimension of an operand with the letter of dimension ``dim`` of the output."""
    if not isinstance(arguments["equation"], str):  # operands and lists of numbers by turns
        return dim if dim < len(arguments[name if name in arguments else int(name)]) else None
    operands = [key for key in arguments if key not in ("equation", "output")]
    found = letters(arguments["equation"], *(len(arguments[key]) for key in operands))
    place = found[list(map(str, operands)).index(name)].find(found[-1][dim])
    return place if place >= 0 else None


def _covers(name: str) -> Any:
    """A condition: the rows of this operand are outer products of the output and the other operand."""

    def covers(arguments: _Arguments) -> bool:
        if len(arguments) != 3 or not isinstance(arguments["equation"], str):
            return False
        try:
            parts = _parts(arguments["equation"], name, arguments["first"], arguments["second"])
            return is_outer(arguments[name], arguments[_other(name)], *parts)
        except ValueError:  # an equation that does not fit: torch says so
            return False

    return covers


def is_outer(weight: Tensor, activations: Tensor, names: str, other: str, out: str) -> bool:
    """Whether the rows of a weight are outer products, by subscripts of both operands and the output."""
    sizes = {**_sizes(names, weight), **_sizes(other, activations)}
    distinct = all(len(set(part)) == len(part) for part in (names, other, out))
    whole = sizes == {**sizes, **_sizes(names, weight)}
    used = set(names) <= set(other + out) and set(other) <= set(names + out)
    return distinct and whole and used and _split(names, other, out) is not None


@register_rule(torch.einsum, wrt="first", needs=["second"], align=_meets, when=_covers("first"))
def einsum_first(c: Tensor, equation: str, first: Tensor, second: Tensor, *others: Any) -> Outer:
    return outer_of(c, second, first, *_parts(equation, "first", first, second[0]))


@register_rule(torch.einsum, wrt="second", needs=["first"], align=_meets, when=_covers("second"))
def einsum_second(c: Tensor, equation: str, first: Tensor, second: Tensor, *others: Any) -> Outer:
    return outer_of(c, first, second, *_parts(equation, "second", first[0], second))


def _other(name: str) -> str:
    return "second" if name == "first" else "first"


def _parts(equation: str, name: str, first: Tensor, second: Tensor) -> tuple[str, str, str]:
    """Subscripts of the weight, of the other operand and of the output."""
    left, right, out = letters(equation, first.ndim, second.ndim)
    return (left, right, out) if name == "first" else (right, left, out)


def _sizes(names: str, tensor: Tensor) -> dict[str, int]:
    return dict(zip(names, tensor.shape, strict=True))


def _split(weight: str, other: str, out: str) -> tuple[str, str, str, bool] | None:
    """Groups, outputs and inputs of a weight, and whether its inputs come before its outputs.

    Letters that weight, activations and output share are groups, and must come first. An output
    letter before the last of these, or between inputs, is one as well: activations repeat along it.
    """
    for start in range(len(weight) + 1):
        groups, rest = weight[:start], weight[start:]
        kinds = ["o" if x in out else "i" for x in rest]
        if any(x not in out for x in groups):
            break
        if any(x in out and x in other for x in rest) or kinds not in (sorted(kinds), sorted(kinds)[::-1]):
            continue
        outputs, inputs = ("".join(x for x in rest if (x in out) is side) for side in (True, False))
        return groups, outputs, inputs, bool(inputs) and rest[0] in inputs
    return None


def outer_of(c: Tensor, a: Tensor, weight: Tensor, names: str, other: str, out: str) -> Outer:
    """Cotangents as ``[K, B, T, G, o]`` and activations as ``[B, T, G, i]``."""
    parts = _split(names, other, out)
    assert parts is not None
    groups, outputs, inputs, transposed = parts
    size = _sizes(names, weight)
    positions = "".join(x for x in out if x not in names)
    where = dict(zip(out, c.shape[2:], strict=True))
    c = _arranged(c, 2, out, positions + groups + outputs)
    c = c.reshape(*c.shape[:2], prod(where[x] for x in positions), *_grouped(size, groups, outputs))
    a = _arranged(a, 1, other, positions + groups + inputs, {**where, **size})
    a = a.reshape(a.shape[0], c.shape[2], *_grouped(size, groups, inputs))
    return Outer(c, a, tuple(weight.shape), transposed)


def _grouped(size: Mapping[str, int], *names: str) -> list[int]:
    return [prod(size[x] for x in part) for part in names]


def _arranged(tensor: Tensor, lead: int, names: str, wanted: str, size: Mapping[str, int] | None = None
              ) -> Tensor:  # fmt: skip
    """The dimensions after ``lead`` in the wanted order, repeated along letters that are missing."""
    for x in wanted:
        if x not in names and size is not None:
            tensor = tensor.unsqueeze(-1).expand(*tensor.shape, size[x])
            names += x
    return tensor.permute([*range(lead), *(lead + names.index(x) for x in wanted)])
