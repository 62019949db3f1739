"""Block principal pivoting, with an exact solve of every face: small problems and hard leftovers.

Kim and Park (2011), "Fast nonnegative matrix factorization: an active-set-like method and
comparisons", SIAM J. Sci. Comput. 33(6), Algorithm 2. All rows, each a problem of its own, take
their steps together.
"""

from __future__ import annotations

import torch
from torch import Tensor

GRACE = 3  # full exchanges allowed without progress, before single pivots, which cannot cycle
CHUNK = 2**22  # matrix entries factorized at once
SMALL = 48  # sizes up to this one are solved by factorizations, larger ones by matrix products


def pivot_rows(hessian: Tensor, linear: Tensor, free: Tensor) -> Tensor:
    """Minimize ``x'Hx / 2 + q'x`` over ``x >= 0``, for each of ``q [R, m]``, ``H [R, m, m]``.

    ``free`` is a first guess of the positive entries. The rows of the result may be unconverged:
    the caller checks.
    """
    rows, size = linear.shape
    chunk = max(1, CHUNK // size**2)
    if rows > chunk:
        parts = zip(hessian.split(chunk), linear.split(chunk), free.split(chunk), strict=True)
        return torch.cat([pivot_rows(*part) for part in parts])
    best = linear.new_full((rows,), size + 1, dtype=torch.long)
    grace = torch.full_like(best, GRACE)
    for step in range(50 + 5 * size):
        x, slack = _minimize_face(hessian, linear, free)
        tolerance = -1e-13 - 1e-13 * x.amax(-1, keepdim=True)
        wrong = x + slack < tolerance  # of these, one is zero but for rounding
        if not bool(wrong.any()):
            break
        if step < GRACE:  # most problems end here, before progress needs watching
            free = free ^ wrong
        else:
            free, best, grace = exchange(free, wrong, best, grace)
    return x.clamp(min=0)


def exchange(free: Tensor, wrong: Tensor, best: Tensor, grace: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Exchange all wrong entries while their count shrinks or grace lasts, else only the last."""
    count = wrong.sum(-1)
    better = count < best
    full = better | (grace > 0)
    grace = torch.where(better, GRACE, torch.where(full, grace - 1, grace))
    order = torch.arange(wrong.shape[-1], device=wrong.device)
    last = order == torch.where(wrong, order, -1).amax(-1, keepdim=True)
    return free ^ (wrong & (full.unsqueeze(-1) | last)), torch.minimum(best, count), grace


def _minimize_face(hessian: Tensor, linear: Tensor, free: Tensor) -> tuple[Tensor, Tensor]:
    """The minimizer with the other entries at zero, and the gradient there."""
    x = -solve_face(hessian, linear, free)
    return x, (hessian @ x.unsqueeze(-1)).squeeze(-1) + linear


def solve_face(hessian: Tensor, target: Tensor, free: Tensor) -> Tensor:
    """``x`` with ``(Hx)[free] = target[free]``, and zero elsewhere; ``[R, m, m]``, ``[R, m]``."""
    factor = face_factor(hessian, free)
    return torch.cholesky_solve((target * free).unsqueeze(-1), factor).squeeze(-1)


def face_factor(hessian: Tensor, free: Tensor) -> Tensor:
    """The Cholesky factor of the Hessian on the face, with the identity for the other entries."""
    identity = torch.eye(hessian.shape[-1], dtype=hessian.dtype, device=hessian.device)
    matrix = torch.where(free.unsqueeze(-1) & free.unsqueeze(-2), hessian, identity)
    return torch.linalg.cholesky_ex(matrix)[0]
