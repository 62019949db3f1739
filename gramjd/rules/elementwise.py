"""Broadcasting arithmetic with a parameter: add, subtract, multiply, divide."""

from __future__ import annotations

import torch
from torch import Tensor

from gramjd.blocks import Dense
from gramjd.rules.registry import register_rule
from gramjd.rules.shapes import broadcast_rows

ADDS = (torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__)
ADDS_INPLACE = (Tensor.add_, Tensor.__iadd__)
SUBS = (torch.sub, torch.subtract, Tensor.sub, Tensor.__sub__)
SUBS_INPLACE = (Tensor.sub_, Tensor.__isub__)
MULS = (torch.mul, torch.multiply, Tensor.mul, Tensor.__mul__, Tensor.__rmul__)


@register_rule(*ADDS, wrt="input", align="right")
def add_input(c: Tensor, input: Tensor, other: Tensor, alpha: float = 1) -> Dense:
    return broadcast_rows(c, None, input)


@register_rule(*ADDS, *ADDS_INPLACE, wrt="other", align="right")
def add_other(c: Tensor, input: Tensor, other: Tensor, alpha: float = 1) -> Dense:
    return broadcast_rows(alpha * c if alpha != 1 else c, None, other)


@register_rule(*SUBS, wrt="input", align="right")
def sub_input(c: Tensor, input: Tensor, other: Tensor, alpha: float = 1) -> Dense:
    return broadcast_rows(c, None, input)


@register_rule(*SUBS, *SUBS_INPLACE, wrt="other", align="right")
def sub_other(c: Tensor, input: Tensor, other: Tensor, alpha: float = 1) -> Dense:
    return broadcast_rows(-alpha * c, None, other)


@register_rule(Tensor.__rsub__, wrt="input", align="right")  # other - input
def rsub_input(c: Tensor, input: Tensor, other: Tensor) -> Dense:
    return broadcast_rows(-c, None, input)


@register_rule(Tensor.__rsub__, wrt="other", align="right")
def rsub_other(c: Tensor, input: Tensor, other: Tensor) -> Dense:
    return broadcast_rows(c, None, other)


@register_rule(*MULS, wrt="input", needs=["other"], align="right")
def mul_input(c: Tensor, input: Tensor, other: Tensor) -> Dense:
    return broadcast_rows(c * other if not isinstance(other, Tensor) else c, _tensor(other), input)


@register_rule(*MULS, wrt="other", needs=["input"], align="right")
def mul_other(c: Tensor, input: Tensor, other: Tensor) -> Dense:
    return broadcast_rows(c, input, other)


def _tensor(value: Tensor | float) -> Tensor | None:
    """The operand, unless it is a Python number."""
    return value if isinstance(value, Tensor) else None
