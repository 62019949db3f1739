"""Block principal pivoting, with an exact solve of every face: small problems and hard leftovers.

Kim and Park (2011), "Fast nonnegative matrix factorization: an active-set-like method and
comparisons", SIAM J. Sci. Comput. 33(6), Algorithm 2. All rows, each a problem of its own, take
their steps together.

A face has one unknown ``z`` an entry: ``x`` where it is free, the slack ``Hx + q`` where it is bound.
One linear system, whose columns are those of ``H`` and of ``-I``, gives them all.
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
    bound = -torch.eye(size, dtype=linear.dtype, device=linear.device)
    target = -linear
    for step in range(50 + 5 * size):
        z = torch.linalg.solve_ex(torch.where(free.unsqueeze(-2), hessian, bound), target)[0]
        tolerance = z.amax(-1, keepdim=True).clamp(min=1).mul(-1e-13)
        wrong = z < tolerance
        if not bool(wrong.any()):
            break
        if step < GRACE:  # most problems end here, before progress needs watching
            free = free ^ wrong
        else:
            free, best, grace = exchange(free, wrong, best, grace)
    return (z * free).clamp(min=0)


def exchange(free: Tensor, wrong: Tensor, best: Tensor, grace: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Exchange all wrong entries while their count shrinks or grace lasts, else only the last."""
    count = wrong.sum(-1)
    better = count < best
    full = better | (grace > 0)
    grace = torch.where(better, GRACE, torch.where(full, grace - 1, grace))
    order = torch.arange(wrong.shape[-1], device=wrong.device)
    last = order == torch.where(wrong, order, -1).amax(-1, keepdim=True)
    return free ^ (wrong & (full.unsqueeze(-1) | last)), torch.minimum(best, count), grace
