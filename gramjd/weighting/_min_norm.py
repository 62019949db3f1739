"""The point of smallest norm in the convex hull of vectors, from their Gramian (MGDA, CAGrad).

On the simplex, ``w'Gw`` is smallest where ``s / sum(s)`` is, with the ``s >= 0`` that minimizes
``s'(G + c 11')s / 2 - c 1's``: in both, ``Gw`` is ``w'Gw`` on the support, and no smaller off it.
The latter is a nonnegative quadratic program. A singular one is solved by the proximal point
method: each step adds ``damping / 2 |s - previous|²``, and a few steps converge.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gramjd.weighting._pivoting import pivot_rows
from gramjd.weighting._shared_hessian import guess_free

# shift (see shifted_program) and damping, one pair after the other until the gap is small enough
ATTEMPTS = [(0.0, 1e-8), (0.5, 1e-8), (1.0, 1e-8), (0.0, 1e-11), (0.5, 1e-11), (1.0, 1e-11)]
GOAL = 1e-13  # optimality gap at which the steps end
ENOUGH = 1e-11  # gap above which another attempt is made


def shifted_program(gramian: Tensor, weight: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """``H [..., m, m]`` with unit diagonal, ``q [..., m]`` and the scale ``d`` with ``s = d x``.

    ``c`` lies between the smallest (``weight`` 0) and the largest (1) squared norm, geometrically.
    A small one resolves short vectors as well as long ones.
    """
    diagonal = gramian.diagonal(dim1=-2, dim2=-1)
    largest = diagonal.amax(-1, keepdim=True)
    largest = torch.where(largest > 0, largest, 1)
    smallest = torch.where(diagonal > 0, diagonal, largest).amin(-1, keepdim=True)
    shift = smallest * (largest / smallest) ** weight
    scale = (diagonal + shift).rsqrt()
    hessian = (gramian + shift.unsqueeze(-1)) * scale.unsqueeze(-1) * scale.unsqueeze(-2)
    return hessian, -scale / scale.amax(-1, keepdim=True), scale


def min_norm(gramian: Tensor, guess: Tensor | None = None) -> Tensor:
    """The weights ``w [B, m]`` on the simplex that minimize ``w'Gw``, for ``G [B, m, m]``.

    ``guess`` is their support, as far as it is known.
    """
    zero = (gramian.diagonal(dim1=-2, dim2=-1) <= 0).to(gramian.dtype)
    zero = zero + (zero.sum(-1, keepdim=True) == 0)  # a zero vector is the point itself; else: any
    best = zero / zero.sum(-1, keepdim=True)
    smallest = simplex_gap(gramian, best)
    for weight, damping in ATTEMPTS:
        program = shifted_program(gramian, weight)
        best, smallest = _proximal_steps(gramian, *program, damping, guess, best, smallest)
        if bool((smallest <= ENOUGH).all()):
            break
        guess = None
    return best


def _proximal_steps(
    gramian: Tensor,
    hessian: Tensor,
    linear: Tensor,
    scale: Tensor,
    damping: float,
    guess: Tensor | None,
    best: Tensor,
    smallest: Tensor,
) -> tuple[Tensor, Tensor]:
    """Go on while the gap shrinks; the best weights so far, and their gap."""
    damped = hessian + damping * torch.diag_embed(torch.ones_like(scale))
    if guess is None:
        guess = guess_free(damped, linear.unsqueeze(-2)).squeeze(-2)
    x = torch.zeros_like(linear)
    for _ in range(30):
        x = pivot_rows(damped, linear - damping * x, guess)
        guess = x > 0
        weights = x * scale
        weights = weights / weights.sum(-1, keepdim=True)
        gap = simplex_gap(gramian, weights)
        better = gap < smallest
        best = torch.where(better.unsqueeze(-1), weights, best)
        smallest = torch.where(better, gap, smallest)
        if not bool((better & (smallest > GOAL)).any()):
            break
    return best, smallest


def simplex_gap(gramian: Tensor, weights: Tensor) -> Tensor:
    """A bound on ``w'Gw`` minus its minimum on the simplex, relative to ``(sum_i w_i |g_i|)²``.

    ``w'Gw - min_i (Gw)_i`` bounds it, by convexity; zero at the minimum and only there.
    """
    slope = (gramian @ weights.unsqueeze(-1)).squeeze(-1)
    norms = gramian.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
    length = (weights * norms).sum(-1)
    gap = (weights * slope).sum(-1) - slope.amin(-1)
    return gap / (length**2).clamp(min=torch.finfo(slope.dtype).tiny)
