"""Linear maps by a weight: ``linear``, ``matmul``, ``addmm``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gramjd.blocks import Dense, Outer
from gramjd.rules.registry import register_rule
from gramjd.rules.shapes import outer, sum_to

MATMULS = (torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__)


def _matrix(name: str) -> Any:
    """Does the rule's own argument have two dimensions?"""
    return lambda arguments: arguments[name].ndim == 2


def _matrices(arguments: Mapping[Any, Any]) -> bool:
    """Is the right operand, too, a matrix (or a stack of them) for every sample?"""
    return arguments["input"].ndim == 2 and arguments["other"].ndim >= 2


@register_rule(F.linear, wrt="weight", needs=["input"], when=_matrix("weight"))
def linear_weight(c: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Outer:
    return outer(c, input, weight)


@register_rule(F.linear, wrt="bias")
def linear_bias(c: Tensor, input: Tensor, weight: Tensor, bias: Tensor) -> Dense:
    return Dense(sum_to(c, bias.shape))


@register_rule(*MATMULS, wrt="other", needs=["input"], when=_matrix("other"))
def matmul_right(c: Tensor, input: Tensor, other: Tensor) -> Outer:
    return outer(c, input, other, transposed=True)


@register_rule(*MATMULS, wrt="input", needs=["other"], align="right", when=_matrices)
def matmul_left(c: Tensor, input: Tensor, other: Tensor) -> Outer:
    return outer(c.mT, other.mT, input)  # every column of every sample is a position


@register_rule(torch.addmm, Tensor.addmm, wrt="mat2", needs=["mat1"])
def addmm_right(
    c: Tensor, input: Tensor, mat1: Tensor, mat2: Tensor, beta: float = 1, alpha: float = 1
) -> Outer:
    return outer(alpha * c, mat1, mat2, transposed=True)


@register_rule(torch.addmm, Tensor.addmm, wrt="input")
def addmm_bias(
    c: Tensor, input: Tensor, mat1: Tensor, mat2: Tensor, beta: float = 1, alpha: float = 1
) -> Dense:
    return Dense(beta * sum_to(c, input.shape))
