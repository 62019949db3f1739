"""Projection onto the dual cone of the gradients, in terms of the Gramian (UPGrad, DualProj)."""

from __future__ import annotations

import torch
from torch import Tensor

from gramjd.weighting._qp import solve_qp


def regularize(matrix: Tensor, norm_eps: float, reg_eps: float) -> tuple[Tensor, Tensor]:
    """The Gramian ``[..., m, m]`` over its trace, plus ``reg_eps`` times identity, to unit diagonal.

    A trace below ``norm_eps`` counts as zero. Returns ``R`` and the scale ``d`` with
    ``R = d G d``.
    """
    if norm_eps < 0 or reg_eps < 0:
        raise ValueError(f"norm_eps and reg_eps cannot be negative; got {norm_eps} and {reg_eps}.")
    diagonal = matrix.diagonal(dim1=-2, dim2=-1)
    trace = diagonal.sum(-1, keepdim=True)
    usable = (trace >= norm_eps) & (trace > 0)
    share = torch.where(usable, 1 / torch.where(usable, trace, 1), 0)
    diagonal = diagonal * share + reg_eps
    scale = torch.where(diagonal > 0, diagonal, 1).rsqrt()
    scaled = matrix * ((share * scale).unsqueeze(-1) * scale.unsqueeze(-2))
    return scaled + torch.diag_embed(reg_eps * scale * scale), scale


def project_units(scaled: Tensor, rounding: float) -> tuple[Tensor, Tensor]:
    """For each unit vector ``e_i``, the ``v >= e_i`` that minimizes ``v'Rv``: ``[..., m, m]``."""
    x, residual = solve_qp(scaled, scaled, rounding)
    return x + torch.eye(x.shape[-1], dtype=x.dtype, device=x.device), residual
