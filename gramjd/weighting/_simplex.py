"""Projection onto the probability simplex, and what shows that it is one (MoDo, SDMGrad)."""

from __future__ import annotations

import torch
from torch import Tensor


def project_onto_simplex(y: Tensor) -> Tensor:
    """The nearest point to ``y [..., m]`` whose entries are not negative and sum to one.

    Duchi et al. (2008), "Efficient projections onto the l1-ball", Figure 1.
    """
    ordered = y.sort(-1, descending=True).values
    counts = torch.arange(1, y.shape[-1] + 1, dtype=y.dtype, device=y.device)
    levels = (ordered.cumsum(-1) - 1) / counts
    support = (ordered > levels).sum(-1, keepdim=True).clamp(min=1)
    return (y - levels.gather(-1, support - 1)).clamp(min=0)


def projection_residual(y: Tensor, point: Tensor) -> Tensor:
    """Largest violation, ``[...]``, of what holds of the projection alone, relative to ``1 + max|y|``.

    ``p >= 0`` sums to one, and ``y - p`` is the same wherever ``p > 0`` and no larger elsewhere.
    """
    rest = y - point
    level = torch.where(point > 0, rest, -torch.inf).amax(-1, keepdim=True)
    complementary = torch.minimum(point, level - rest).abs().amax(-1)
    total = (point.sum(-1) - 1).abs()
    return torch.maximum(complementary, total) / (1 + y.abs().amax(-1))
