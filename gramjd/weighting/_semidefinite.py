"""The positive semi-definite part of a Gramian that rounding has made slightly indefinite."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from gramjd.weighting._opaque import opaque


def semidefinite(matrix: Tensor, rounding: float, reg_eps: float = 0.0) -> Tensor:
    """``G [..., m, m]`` itself if ``G + reg_eps I`` is positive definite, else its positive part.

    ``reg_eps`` is what the caller will add anyway. ``rounding`` is how negative an eigenvalue of
    the Gramian scaled to unit diagonal may be, per row, and still pass for rounding. The correction
    is a constant for autograd.

    Raises:
        ValueError: an eigenvalue is more negative.
    """
    return matrix + opaque(partial(_correction, rounding=rounding, reg_eps=reg_eps), matrix)


def _correction(matrix: Tensor, rounding: float, reg_eps: float) -> Tensor:
    size = matrix.shape[-1]
    diagonal = matrix.diagonal(dim1=-2, dim2=-1).clamp(min=0)
    slack = reg_eps if reg_eps > 1e-12 else 1e-14 * size * diagonal + (diagonal <= 0)
    shifted = matrix.clone()
    shifted.diagonal(dim1=-2, dim2=-1).add_(slack)
    if not bool(torch.linalg.cholesky_ex(shifted).info.any()):
        return matrix.new_zeros((*matrix.shape[:-2], 1, 1))
    unit = torch.where(diagonal > 0, diagonal, torch.inf).rsqrt()
    correlation = matrix * unit.unsqueeze(-1) * unit.unsqueeze(-2)
    values, vectors = torch.linalg.eigh(correlation)
    if bool((values < -rounding * size).any()):
        raise ValueError(
            "The Gramian is not positive semi-definite: scaled to unit diagonal, it has the "
            f"eigenvalue {float(values.min()):.1e}, more than rounding explains. Pass J @ J.T."
        )
    positive = (vectors * values.clamp(min=0).unsqueeze(-2)) @ vectors.mT
    root = diagonal.sqrt()
    return positive * root.unsqueeze(-1) * root.unsqueeze(-2) - matrix
