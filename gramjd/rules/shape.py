"""Shape ops on a parameter before its use."""

from __future__ import annotations

from torch import Tensor

from gramjd.blocks import Dense
from gramjd.rules.registry import register_rule
from gramjd.rules.shapes import sum_to


@register_rule(Tensor.expand, wrt="input")
def expand_input(c: Tensor, input: Tensor, *size: int) -> Dense:
    return Dense(sum_to(c, input.shape))
