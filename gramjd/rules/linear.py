"""Linear maps by a weight: ``linear``, ``matmul``, ``addmm``, ``bmm``, ``bilinear``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gramjd.blocks import Block, Dense, Outer
from gramjd.rules.registry import register_rule
from gramjd.rules.shapes import broadcast_rows, outer, sum_to

MATMULS = (torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__)
MVS = (torch.mv, Tensor.mv)
BMMS = (torch.bmm, Tensor.bmm)
ADDMMS = (torch.addmm, Tensor.addmm)
BADDBMMS = (torch.baddbmm, Tensor.baddbmm)


def _matrix(name: str) -> Any:
    """A condition: the argument has two dimensions."""
    return lambda arguments: arguments[name].ndim == 2


def _right(arguments: Mapping[Any, Any]) -> bool:
    """Whether the right operand is a vector, a matrix, or one matrix for each of the left operand's."""
    left, right = arguments["input"], arguments["other"]
    return right.ndim <= 2 or (right.ndim == 3 and left.ndim >= 3 and left.shape[-3] == right.shape[0])


def _left(arguments: Mapping[Any, Any]) -> bool:
    """Whether the left operand is a matrix, or one matrix for each of the right operand's."""
    left, right = arguments["input"], arguments["other"]
    if left.ndim == 2:
        return True
    return left.ndim == 3 and right.ndim >= 3 and right.shape[-3] == left.shape[0]


@register_rule(F.linear, wrt="weight", needs=["input"], when=_matrix("weight"))
def linear_weight(c: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Outer:
    return outer(c, input, weight)


@register_rule(F.linear, wrt="bias")
def linear_bias(c: Tensor, input: Tensor, weight: Tensor, bias: Tensor) -> Dense:
    return Dense(sum_to(c, bias.shape))


@register_rule(*MATMULS, wrt="other", needs=["input"], when=_right)
def matmul_right(c: Tensor, input: Tensor, other: Tensor) -> Block:
    if other.ndim == 1:
        return broadcast_rows(c.unsqueeze(-1).expand(*c.shape, len(other)), input, other)
    if other.ndim == 3:
        return _one_each(c, input, other, transposed=True)
    return outer(c, input, other, transposed=True)


@register_rule(*MATMULS, wrt="input", needs=["other"], align="right", when=_left)
def matmul_left(c: Tensor, input: Tensor, other: Tensor) -> Outer:
    if input.ndim == 3:
        return _one_each(c.mT, other.mT, input)
    if other.ndim == 2:  # a vector for each sample
        return outer(c, other, input)
    return outer(c.mT, other.mT, input)  # every column of every sample is a position


@register_rule(*MVS, wrt="vec", needs=["input"])
def mv_right(c: Tensor, input: Tensor, vec: Tensor) -> Dense:
    return broadcast_rows(c.unsqueeze(-1).expand(*c.shape, len(vec)), input, vec)


@register_rule(*MVS, wrt="input", needs=["vec"])
def mv_left(c: Tensor, input: Tensor, vec: Tensor) -> Outer:
    return outer(c, vec, input)


@register_rule(*BMMS, wrt="mat2", needs=["input"])
def bmm_right(c: Tensor, input: Tensor, mat2: Tensor) -> Outer:
    return _one_each(c, input, mat2, transposed=True)


@register_rule(*BMMS, wrt="input", needs=["mat2"])
def bmm_left(c: Tensor, input: Tensor, mat2: Tensor) -> Outer:
    return _one_each(c.mT, mat2.mT, input)


@register_rule(*BADDBMMS, wrt="batch2", needs=["batch1"])
def baddbmm_right(
    c: Tensor, input: Tensor, batch1: Tensor, batch2: Tensor, beta: float = 1, alpha: float = 1
) -> Outer:
    return _one_each(alpha * c, batch1, batch2, transposed=True)


@register_rule(*BADDBMMS, wrt="batch1", needs=["batch2"])
def baddbmm_left(
    c: Tensor, input: Tensor, batch1: Tensor, batch2: Tensor, beta: float = 1, alpha: float = 1
) -> Outer:
    return _one_each(alpha * c.mT, batch2.mT, batch1)


@register_rule(*ADDMMS, wrt="mat2", needs=["mat1"])
def addmm_right(
    c: Tensor, input: Tensor, mat1: Tensor, mat2: Tensor, beta: float = 1, alpha: float = 1
) -> Outer:
    return outer(alpha * c, mat1, mat2, transposed=True)


@register_rule(*ADDMMS, wrt="mat1", needs=["mat2"], align="right")
def addmm_left(
    c: Tensor, input: Tensor, mat1: Tensor, mat2: Tensor, beta: float = 1, alpha: float = 1
) -> Outer:
    return outer(alpha * c.mT, mat2.mT, mat1)


@register_rule(*ADDMMS, wrt="input")
def addmm_bias(
    c: Tensor, input: Tensor, mat1: Tensor, mat2: Tensor, beta: float = 1, alpha: float = 1
) -> Dense:
    return Dense(beta * sum_to(c, input.shape))


@register_rule(*BADDBMMS, wrt="input")
def baddbmm_bias(
    c: Tensor, input: Tensor, batch1: Tensor, batch2: Tensor, beta: float = 1, alpha: float = 1
) -> Dense:
    return Dense(beta * sum_to(c, input.shape))


@register_rule(F.bilinear, wrt="weight", needs=["input1", "input2"])
def bilinear_weight(
    c: Tensor, input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Outer:
    return outer(c, (input1.unsqueeze(-1) * input2.unsqueeze(-2)).flatten(-2), weight)


@register_rule(F.bilinear, wrt="bias")
def bilinear_bias(c: Tensor, input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor) -> Dense:
    return Dense(sum_to(c, bias.shape))


def _one_each(c: Tensor, a: Tensor, weight: Tensor, transposed: bool = False) -> Outer:
    """``c [K, B, *L, G, T, o]`` and ``a [B, *L, G, T, i]`` with a matrix for each ``G``."""
    c = c.transpose(-2, -3).flatten(2, -3)  # the flattened L and T
    a = a.transpose(-2, -3).flatten(1, -3)
    return Outer(c, a, tuple(weight.shape), transposed)
