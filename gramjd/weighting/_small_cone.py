"""UPGrad's projections for one small Gramian on the CPU, in as few tensor operations as possible.

Of a dozen objectives the arithmetic takes no time: what counts is how many operations are called.
This is the same problem, pivoting and certificate as in ``_dual_cone`` and ``_pivoting``, without
what batches, derivatives, other devices and hard cases need. Those are left to the general way.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gramjd.weighting._certificate import CERTIFIED
from gramjd.weighting._opaque import is_constant

LARGEST = 32  # objectives
ROUNDS = 6  # of pivoting, before the general way with its better first guess takes over
STEP = 0.6  # of projected gradient descent, for a Hessian of unit diagonal


def small_projections(gramian: Tensor, norm_eps: float, reg_eps: float) -> tuple[Tensor, Tensor] | None:
    """The projections ``[m, m]`` and the scale ``[m]``, as of ``project_units`` and ``regularize``.

    ``None`` if the Gramian is not of the easy kind: then the general way says what is wrong with it,
    or solves it.
    """
    if not isinstance(gramian, Tensor) or gramian.ndim != 2 or gramian.device.type != "cpu":
        return None
    if not (0 < len(gramian) <= LARGEST and gramian.is_floating_point() and is_constant(gramian)):
        return None
    matrix = gramian.detach().to(torch.float64)
    if not torch.equal(matrix, matrix.mT) or min(norm_eps, reg_eps) < 0:
        return None  # rounding, or NaN, or no square
    diagonal = matrix.diagonal()
    trace = float(diagonal.sum())
    if not max(norm_eps, 1e-300) <= trace < 1e300 or float(diagonal.min()) < 0:
        return None
    scale = diagonal.div(trace).add_(reg_eps).rsqrt_()
    hessian = torch.outer(scale, scale / trace).mul_(matrix).fill_diagonal_(1)
    if int(torch.linalg.cholesky_ex(hessian).info):
        return None
    x = _pivot(hessian)
    if x is None:
        return None
    residual = torch.minimum(x, torch.addmm(hessian, x, hessian)).abs_().amax()
    if not float(residual) <= CERTIFIED:
        return None
    x.diagonal().add_(1)
    return x, scale


def _pivot(hessian: Tensor) -> Tensor | None:
    """For each row, the ``x >= 0`` that minimizes ``(x + e_i)'H(x + e_i)``; ``None`` if it takes long."""
    start = hessian * -STEP
    matrix = start.clone().fill_diagonal_(1 - STEP)
    x = start.clamp(min=0)
    for _ in range(3):
        x = torch.addmm(start, x, matrix).clamp_(min=0)
    free = x > 0
    bound = torch.zeros_like(hessian).fill_diagonal_(-1)
    target = -hessian
    for _ in range(ROUNDS):
        z = torch.linalg.solve_ex(torch.where(free.unsqueeze(-2), hessian, bound), target)[0]
        wrong = z < -1e-12
        if not bool(wrong.any()):
            return z.mul_(free).clamp_(min=0)
        free ^= wrong
    return None
