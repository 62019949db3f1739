"""Shape ops on a parameter before its use."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gramjd.blocks import Dense
from gramjd.rules.registry import register_rule
from gramjd.rules.shapes import sum_to


@register_rule(Tensor.expand, Tensor.broadcast_to, wrt="input")
def expand_input(c: Tensor, input: Tensor, *size: int) -> Dense:
    return Dense(sum_to(c, input.shape))


@register_rule(torch.broadcast_to, wrt="input")
def broadcast_input(c: Tensor, input: Tensor, size: Sequence[int]) -> Dense:
    return Dense(sum_to(c, input.shape))


@register_rule(Tensor.expand_as, wrt="input")
def expand_as_input(c: Tensor, input: Tensor, other: Tensor) -> Dense:
    return Dense(sum_to(c, input.shape))


@register_rule(Tensor.repeat, wrt="input")
def repeat_input(c: Tensor, input: Tensor, *repeats: int) -> Dense:
    c = c.sum([*range(2, c.ndim - input.ndim)]) if c.ndim - 2 > input.ndim else c
    for d, size in enumerate(input.shape):
        c = c.unflatten(2 + d, (-1, size)).sum(2 + d)
    return Dense(c)
