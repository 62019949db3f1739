"""UPGrad: project each objective's gradient onto the dual cone of all, and combine."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gramjd.weighting._gramian import flat_preference, prepare
from gramjd.weighting._pivoting import pivot


def upgrad(
    gramian: Tensor,
    preference: Tensor | None = None,
    *,
    norm_eps: float = 1e-4,
    reg_eps: float = 1e-4,
) -> Tensor:
    """Weights of UPGrad (Quinton and Rey, arXiv 2406.16232, Proposition 1 and Equation 4)."""
    matrix, restore = prepare(gramian)
    weights = flat_preference(preference, matrix, gramian).clamp(min=0)
    if matrix.ndim == 3:
        weights = weights.expand(matrix.shape[0], -1)
        return restore(torch.stack([_weights(g, p, norm_eps, reg_eps) for g, p in zip(matrix, weights)]))
    return restore(_weights(matrix, weights, norm_eps, reg_eps))


def _weights(matrix: Tensor, preference: Tensor, norm_eps: float, reg_eps: float) -> Tensor:
    trace = matrix.diagonal().sum()
    identity = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    matrix = torch.where(trace < norm_eps, 0.0, matrix / trace) + reg_eps * identity
    scale = matrix.diagonal().rsqrt()
    matrix = matrix * scale[:, None] * scale
    rows = []
    chunk = max(1, 2**24 // matrix.numel())
    for linear in matrix.split(chunk):
        rows.append(pivot(matrix.expand(len(linear), -1, -1), linear)[0])
    projections = torch.cat(rows) + identity
    return scale * ((preference / scale) @ projections)


class UPGradWeighting(nn.Module):
    """:func:`upgrad` as an object, with TorchJD's name and arguments."""

    def __init__(self, pref_vector: Tensor | None = None) -> None:
        super().__init__()
        self.pref_vector = pref_vector

    def forward(self, gramian: Tensor, /) -> Tensor:
        """Weights of the objectives, with their shape."""
        return upgrad(gramian, self.pref_vector)
