"""Broadcasting arithmetic with a parameter: add, subtract, multiply, divide, and their combinations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gramjd.blocks import Dense
from gramjd.rules.registry import register_rule
from gramjd.rules.shapes import broadcast_rows, sum_to, times

ADDS = (torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__)
ADDS_INPLACE = (Tensor.add_, Tensor.__iadd__)
SUBS = (torch.sub, torch.subtract, Tensor.sub, Tensor.__sub__)
SUBS_INPLACE = (Tensor.sub_, Tensor.__isub__)
MULS = (torch.mul, torch.multiply, Tensor.mul, Tensor.__mul__, Tensor.__rmul__)
DIVS = (torch.div, torch.divide, torch.true_divide, Tensor.div, Tensor.true_divide, Tensor.__truediv__)
ADDCMULS = (torch.addcmul, Tensor.addcmul)
LERPS = (torch.lerp, Tensor.lerp)


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
def mul_input(c: Tensor, input: Tensor, other: Tensor | float) -> Dense:
    return broadcast_rows(c, other, input)


@register_rule(*MULS, wrt="other", needs=["input"], align="right")
def mul_other(c: Tensor, input: Tensor, other: Tensor) -> Dense:
    return broadcast_rows(c, input, other)


def _exact(arguments: Mapping[Any, Any]) -> bool:
    """A rounded quotient has no gradient to speak of."""
    return arguments.get("rounding_mode") is None


@register_rule(*DIVS, wrt="input", needs=["other"], align="right", when=_exact)
def div_input(c: Tensor, input: Tensor, other: Tensor | float, rounding_mode: None = None) -> Dense:
    return broadcast_rows(c, 1 / other, input)


@register_rule(*DIVS, wrt="other", needs=["input"], align="right", when=_exact)
def div_other(c: Tensor, input: Tensor, other: Tensor, rounding_mode: None = None) -> Dense:
    return Dense(broadcast_rows(-c, input, other).values / other.square())


@register_rule(Tensor.__rtruediv__, wrt="input", needs=["other"], align="right")  # other / input
def rdiv_input(c: Tensor, input: Tensor, other: Tensor | float) -> Dense:
    return Dense(broadcast_rows(-c, other, input).values / input.square())


@register_rule(Tensor.__rtruediv__, wrt="other", needs=["input"], align="right")
def rdiv_other(c: Tensor, input: Tensor, other: Tensor) -> Dense:
    return broadcast_rows(c, 1 / input, other)


@register_rule(*ADDCMULS, wrt="input", align="right")
def addcmul_input(c: Tensor, input: Tensor, tensor1: Tensor, tensor2: Tensor, value: float = 1) -> Dense:
    return broadcast_rows(c, None, input)


@register_rule(*ADDCMULS, wrt="tensor1", needs=["tensor2"], align="right")
def addcmul_first(c: Tensor, input: Tensor, tensor1: Tensor, tensor2: Tensor, value: float = 1) -> Dense:
    return broadcast_rows(value * c, tensor2, tensor1)


@register_rule(*ADDCMULS, wrt="tensor2", needs=["tensor1"], align="right")
def addcmul_second(c: Tensor, input: Tensor, tensor1: Tensor, tensor2: Tensor, value: float = 1) -> Dense:
    return broadcast_rows(value * c, tensor1, tensor2)


@register_rule(*LERPS, wrt="input", needs=["weight"], align="right")
def lerp_input(c: Tensor, input: Tensor, end: Tensor, weight: Tensor | float) -> Dense:
    return broadcast_rows(c, 1 - weight, input)


@register_rule(*LERPS, wrt="end", needs=["weight"], align="right")
def lerp_end(c: Tensor, input: Tensor, end: Tensor, weight: Tensor | float) -> Dense:
    return broadcast_rows(c, weight, end)


@register_rule(*LERPS, wrt="weight", needs=["input", "end"], align="right")
def lerp_weight(c: Tensor, input: Tensor, end: Tensor, weight: Tensor) -> Dense:
    return broadcast_rows(times(c, end) - times(c, input), None, weight)


@register_rule(torch.where, wrt="input", needs=["condition"], align="right")
def where_input(c: Tensor, condition: Tensor, input: Tensor, other: Tensor | float) -> Dense:
    return broadcast_rows(c, condition, input)


@register_rule(torch.where, wrt="other", needs=["condition"], align="right")
def where_other(c: Tensor, condition: Tensor, input: Tensor | float, other: Tensor) -> Dense:
    return broadcast_rows(c, ~condition, other)


@register_rule(Tensor.where, wrt="input", needs=["condition"], align="right")
def where_method_input(c: Tensor, input: Tensor, condition: Tensor, other: Tensor | float) -> Dense:
    return broadcast_rows(c, condition, input)


@register_rule(Tensor.where, wrt="other", needs=["condition"], align="right")
def where_method_other(c: Tensor, input: Tensor, condition: Tensor, other: Tensor) -> Dense:
    return broadcast_rows(c, ~condition, other)


@register_rule(F.prelu, wrt="weight", needs=["input"])
def prelu_weight(c: Tensor, input: Tensor, weight: Tensor) -> Dense:
    c = times(c, input.clamp(max=0))
    channels = (weight.numel(), *[1] * (c.ndim - 4)) if c.ndim > 3 else ()
    return Dense(sum_to(c, channels).reshape(*c.shape[:2], *weight.shape))
