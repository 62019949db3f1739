"""Ops that are replayed as a Python function of ops that have rules: no rule sees inside them.

Under ``vmap`` the decomposition runs in place of the op. In ``Engine`` the op itself runs, and its blocks
come from a replay of the decomposition on the arguments that it received.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from gramjd.internals import weight_norm_op
from gramjd.rules.registry import Op

E = TypeVar("E", bound=Callable[..., Any])


DECOMPOSITIONS: dict[Op, Callable[..., Any]] = {}


def register_decomposition(*ops: Op) -> Callable[[E], E]:
    """Decorator: register the function as what an op (and its aliases) computes.

    It takes the op's own arguments and returns what the op returns, by ops that have rules.
    """

    def register(function: E) -> E:
        for op in ops:
            DECOMPOSITIONS[op] = function
        return function

    return register


def decomposition_of(op: Op) -> Callable[..., Any] | None:
    """The decomposition of an op; ``None`` if it has none."""
    try:
        return DECOMPOSITIONS.get(op)
    except TypeError:  # an unhashable callable has none
        return None


def expanded() -> list[Op]:
    """Every op that has a decomposition; the tests go through all of them."""
    return list(DECOMPOSITIONS)


@register_decomposition(F.bilinear)
def bilinear(input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A bilinear map as one linear map of all products; ``vmap`` has no batching rule for the op."""
    out = F.linear((input1.unsqueeze(-1) * input2.unsqueeze(-2)).flatten(-2), weight.flatten(1))
    return out if bias is None else out + bias


@register_decomposition(weight_norm_op)
def weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """``g v / |v|``, the norm over all dimensions but one (over all of them where ``dim`` is -1)."""
    others = [d for d in range(v.ndim) if dim == -1 or d != dim % v.ndim]
    return v * (g / torch.linalg.vector_norm(v, dim=others, keepdim=True))
