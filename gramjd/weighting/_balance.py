"""Solve ``Gw = w^-p``, ``w > 0``, for NashMTL (``p = 1``) and FairGrad (``p = 1 / alpha``).

The weights minimize the strictly convex ``w'Gw / 2 - sum_i φ(w_i)`` with ``φ'(w) = w^-p``. A
primal-dual interior point method finds them, in units in which ``w = 1`` solves a diagonal Gramian.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from gramjd.weighting._opaque import opaque
from gramjd.weighting._semidefinite import semidefinite

GOAL = 1e-12  # residual at which the iterations end


def balance(matrix: Tensor, power: float, reg_eps: float, rounding: float) -> tuple[Tensor, Tensor]:
    """``w [..., m]`` for ``G [..., m, m]``, and the residual of the equation, see ``_residual``.

    Each ``G_ii`` is enlarged by the factor ``1 + reg_eps``, without which conflicting gradients
    that sum to zero would have no solution; a zero ``G_ii`` is replaced by the mean of the others.
    """
    constant = matrix.detach().diagonal(dim1=-2, dim2=-1)
    nonzero = constant > 0
    mean = constant.sum(-1, keepdim=True) / nonzero.sum(-1, keepdim=True).clamp(min=1)
    mean = torch.where(mean > 0, mean, 1)
    matrix = semidefinite(matrix / mean.unsqueeze(-1), rounding)
    relative = torch.where(nonzero, matrix.diagonal(dim1=-2, dim2=-1), 1)
    factor = relative ** ((power - 1) / (power + 1))  # of each φ, in units 1 / scale
    scale = relative ** (-1 / (power + 1))
    enlarged = torch.where(nonzero, reg_eps * relative, 1)
    matrix = matrix + torch.diag_embed(enlarged)
    hessian = matrix * scale.unsqueeze(-1) * scale.unsqueeze(-2)
    t = opaque(partial(_interior_point, power=power), hessian, factor)
    for _ in range(2):  # finish, and give the derivatives: two steps are right to the third order
        gradient = (hessian @ t.unsqueeze(-1)).squeeze(-1) - factor * t**-power
        full = hessian + torch.diag_embed(power * factor * t ** (-power - 1))
        t = t - torch.linalg.solve(full, gradient)
    residual = _residual(hessian.detach(), t.detach(), factor.detach(), power)
    return mean ** (-1 / (1 + power)) * scale * t, residual


def _residual(hessian: Tensor, t: Tensor, factor: Tensor, power: float) -> Tensor:
    """Largest error of ``t^p Ht = c``, relative to what its terms would sum to without cancelling.

    Nothing smaller can be asked for: so much changes when the Gramian's entries are rounded.
    """
    both = torch.stack([hessian, hessian.abs()], -3) @ t.unsqueeze(-1).unsqueeze(-3)
    product, size = (t**power / factor).unsqueeze(-2).mul(both.squeeze(-1)).unbind(-2)
    return ((product - 1).abs() / size.clamp(min=1)).amax(-1)


def _interior_point(hessian: Tensor, factor: Tensor, power: float) -> Tensor:
    """Newton's method on ``Ht = z`` and ``log z + p log t = log c`` inside ``t, z > 0``."""
    start = factor.sum(-1, keepdim=True) / hessian.sum((-2, -1)).unsqueeze(-1).clamp(min=1e-12)
    t = (start ** (1 / (1 + power))).expand(factor.shape)
    z = factor * t**-power
    for _ in range(200):
        if bool((_residual(hessian, t, factor, power) < GOAL).all()):
            break
        miss = (factor / z).log() - power * t.log()
        matrix = hessian + torch.diag_embed(power * z / t)
        right = z * (1 + miss) - (hessian @ t.unsqueeze(-1)).squeeze(-1)
        cholesky, _ = torch.linalg.cholesky_ex(matrix)
        step = torch.cholesky_solve(right.unsqueeze(-1), cholesky).squeeze(-1)
        t, z = _inside(t, step), _inside(z, z * (miss - power * step / t))
    return t


def _inside(value: Tensor, step: Tensor) -> Tensor:
    """Step at most nine tenths of the way to where the first entry would become zero."""
    reach = (-step / value).amax(-1, keepdim=True).clamp(min=0.9)
    return value + 0.9 / reach * step
