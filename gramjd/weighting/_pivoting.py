"""Stage-1 exact solver: block principal pivoting with masked Cholesky factorizations."""

from __future__ import annotations

import torch
from torch import Tensor


def pivot(hessian: Tensor, linear: Tensor) -> tuple[Tensor, Tensor]:
    """Minimize ``x'Hx / 2 + q'x`` over ``x >= 0``; rows ``[R, m, m]`` and ``[R, m]``; also the free set."""
    rows, size = linear.shape
    free = linear < 0
    best = linear.new_full((rows,), size + 1, dtype=torch.long)
    grace = torch.full_like(best, 3)
    order = torch.arange(size, device=linear.device)
    for _ in range(50 + 10 * size):
        x, slack = _face(hessian, linear, free)
        wrong = torch.where(free, x < -1e-12, slack < -1e-12)
        count = wrong.sum(-1)
        if not bool(count.any()):
            return x.clamp(min=0), free
        better = count < best
        full = better | (grace > 0)
        grace = torch.where(better, 3, torch.where(full, grace - 1, grace))
        best = torch.minimum(best, count)
        last = torch.where(wrong, order, -1).amax(-1, keepdim=True)
        free = free ^ (wrong & (full[:, None] | (order == last)))
    raise RuntimeError("The quadratic program did not converge; the Gramian may not be positive semi-definite.")


def _face(hessian: Tensor, linear: Tensor, free: Tensor) -> tuple[Tensor, Tensor]:
    """The minimizer on the face of the free variables, and the gradient there."""
    mask = free.to(hessian.dtype)
    matrix = hessian * mask.unsqueeze(-1) * mask.unsqueeze(-2) + torch.diag_embed(1 - mask)
    factor, _ = torch.linalg.cholesky_ex(matrix)
    x = torch.cholesky_solve(-(linear * mask).unsqueeze(-1), factor).squeeze(-1)
    return x, torch.einsum("rij,rj->ri", hessian, x) + linear
