"""Gradients into ``.grad`` by autograd's own accumulation, and without a copy of each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gramjd.internals import innermost_transform, plain_apply


def accumulate(leaves: Sequence[Tensor], gradients: list[Tensor]) -> None:
    """Add to the leaves' ``.grad``, as a backward pass would add it; ``gradients`` is empty afterwards.

    Hooks run as in any backward pass. Autograd makes a gradient ``.grad`` itself, instead of a copy,
    where nobody else holds it: so the caller must not.
    """
    if leaves:
        with torch.enable_grad():
            end = (_APPLY if innermost_transform() is None else _HandOver.apply)(gradients, *leaves)
        end.backward()


class _HandOver(torch.autograd.Function):
    """A node without a meaningful value, whose backward pass returns the given gradients."""

    @staticmethod
    def forward(ctx: Any, gradients: list[Tensor], *leaves: Tensor) -> Tensor:
        ctx.gradients = gradients
        return torch.zeros((), device=leaves[0].device)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        given = tuple(ctx.gradients)
        ctx.gradients.clear()
        return None, *given


_APPLY = plain_apply(_HandOver)  # without a search among all leaves for wrappers of transforms
