"""Projection onto the dual cone of the gradients, in terms of the Gramian (UPGrad, DualProj)."""

from __future__ import annotations

import torch
from torch import Tensor

from gramjd.weighting._options import not_negative
from gramjd.weighting._qp import solve_qp
from gramjd.weighting._semidefinite import semidefinite

REMEDY = "The Gramian may be too ill-conditioned: raise reg_eps."


def regularize(matrix: Tensor, norm_eps: float, reg_eps: float, rounding: float) -> tuple[Tensor, Tensor]:
    """The Gramian ``[..., m, m]`` over its trace, plus ``reg_eps`` times the identity, as ``R``.

    ``R`` is scaled to unit diagonal on both sides by ``d``; both are returned. A trace below
    ``norm_eps`` counts as zero; ``rounding`` is for :func:`semidefinite`.
    """
    not_negative("norm_eps", norm_eps)
    not_negative("reg_eps", reg_eps)
    trace = matrix.diagonal(dim1=-2, dim2=-1).sum(-1, keepdim=True).unsqueeze(-1)
    smallest = max(norm_eps, torch.finfo(trace.dtype).tiny)
    share = (trace >= smallest) / trace.clamp(min=smallest)
    identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    matrix = torch.add(semidefinite(matrix * share, rounding, reg_eps), identity, alpha=reg_eps)
    diagonal = matrix.diagonal(dim1=-2, dim2=-1)
    scale = diagonal.rsqrt() if reg_eps else (diagonal + (diagonal <= 0)).rsqrt()
    return matrix * scale.unsqueeze(-1) * scale.unsqueeze(-2), scale


def project_units(scaled: Tensor, ridge: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The ``v >= e_i`` that minimizes ``v'Rv``, for each unit vector ``e_i``: ``[..., m, m]``.

    ``ridge [..., m]`` is the part of the diagonal of ``R`` that regularizes.
    """
    x, residual = solve_qp(scaled, scaled, ridge)
    return x + torch.eye(x.shape[-1], dtype=x.dtype, device=x.device), residual


def project(scaled: Tensor, target: Tensor, ridge: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The ``v >= u [..., m]`` that minimizes ``v'Rv``, and the KKT residual."""
    size = target.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(target.dtype).tiny).detach()
    unit = (target / size).expand(scaled.shape[:-1])  # the solution scales with u
    linear = unit.unsqueeze(-2) @ scaled
    # the slack can be as large as the sum of a row; residuals are relative to that
    growth = linear.abs().amax(-1, keepdim=True).clamp(min=1).detach()
    x, residual = solve_qp(scaled, linear / growth, ridge)
    return size * (unit + (growth * x).squeeze(-2)), residual.squeeze(-1)
