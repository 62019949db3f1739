"""Nonnegative quadratic programs: ``min_x x'Hx / 2 + q'x`` over ``x >= 0``, in batches.

The solution is ``x >= 0`` with slack ``Hx + q >= 0`` and no entry where both are positive; the
largest ``|min(x, slack)|`` is the KKT residual.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gramjd.weighting._faces import on_face
from gramjd.weighting._opaque import opaque
from gramjd.weighting._pivoting import SMALL, pivot_rows
from gramjd.weighting._shared_hessian import guess_free, solve_rows


def solve_qp(hessian: Tensor, linear: Tensor, ridge: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Solve for every row of ``linear [..., r, m]``, given ``hessian [..., m, m]`` (unit diagonal).

    The rows should be of order one. Returns ``x [..., r, m]`` and the KKT residuals ``[..., r]``,
    unscaled. Differentiable in both, by the active set. ``ridge [..., m]``, if given, is the part of the
    Hessian's diagonal that regularizes, for a preconditioner.
    """
    given = (hessian, linear) if ridge is None else (hessian, linear, ridge)
    x, free, residual = opaque(_solve, *given)
    return on_face(hessian, -linear, free, x), residual


def _solve(hessian: Tensor, linear: Tensor, ridge: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    shape = linear.shape
    hessian = hessian.reshape(-1, shape[-1], shape[-1])
    linear = linear.reshape(-1, *shape[-2:])
    x = _small(hessian, linear) if shape[-1] <= SMALL else _large(hessian, linear, ridge)
    slack = torch.baddbmm(linear, x, hessian)
    residual = torch.minimum(x, slack).abs().amax(-1)
    return x.reshape(shape), (x > slack).reshape(shape), residual.reshape(shape[:-1])


def _small(hessian: Tensor, linear: Tensor) -> Tensor:
    """``[B, m, m]``, ``[B, r, m]``: every row with its own copy of the Hessian."""
    batch, rows, size = linear.shape
    each = hessian.unsqueeze(1).expand(-1, rows, -1, -1)
    each = each[0] if batch == 1 else each.reshape(-1, size, size)
    free = guess_free(hessian, linear).reshape(-1, size)
    return pivot_rows(each, linear.reshape(-1, size), free).reshape(batch, rows, size)


def _large(hessian: Tensor, linear: Tensor, ridge: Tensor | None) -> Tensor:
    """``[B, m, m]``, ``[B, r, m]``: one Hessian after the other, its rows together."""
    ridges = [None] * len(hessian) if ridge is None else ridge.reshape(-1, ridge.shape[-1])
    results = []
    for matrix, rows, own in zip(hessian, linear, ridges, strict=True):
        x, done = solve_rows(matrix, rows, own)
        if not bool(done.all()):
            left = torch.nonzero(~done).squeeze(-1)
            each = matrix.expand(len(left), -1, -1)
            x[left] = pivot_rows(each, rows[left], x[left] > 0)
        results.append(x)
    return torch.stack(results)
