"""Many nonnegative quadratic programs with one Hessian, by matrix products alone.

Each row minimizes ``x'Hx / 2 + q'x`` over ``x >= 0``. First, ADMM (Boyd et al. 2011, section 5) in
float32 finds nearly the right free set of each row. Block principal pivoting then corrects it; the
minimizer on a face comes from conjugate gradients in float32, whose residual is renewed in
float64 (iterative refinement): loosely while entries are still exchanged, tightly at the end; and
tightly from the start, with a preconditioner, where the Hessian is ill-conditioned.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gramjd.weighting._pivoting import GRACE, exchange
from gramjd.weighting._precondition import LowRank, OnFaces, low_rank

HARD = 1000.0  # condition number above which conjugate gradients are preconditioned
TINY = 12  # sizes up to this one need no better start than a few gradient steps
LOOSE, TIGHT = 0.03, 1e-4  # what one call of conjugate gradients reduces the residual to
FINAL = 1e-12  # residual at which a row is done


@dataclass
class _Rows:
    """The rows not yet done: where they belong, their problem, their state."""

    index: Tensor
    linear: Tensor
    x: Tensor
    free: Tensor
    best: Tensor
    grace: Tensor
    clean: Tensor  # no entry was on the wrong side when last looked at

    def take(self, keep: Tensor) -> _Rows:
        return _Rows(**{name: value[keep] for name, value in vars(self).items()})


def solve_rows(
    hessian: Tensor, linear: Tensor, ridge: Tensor | None = None, rounds: int = 60
) -> tuple[Tensor, Tensor]:
    """Solve all rows of ``linear [R, m]`` for one ``hessian [m, m]`` with unit diagonal.

    ``ridge [m]`` is the part of that diagonal that regularizes: it makes a preconditioner.

    Returns ``x [R, m]`` and the rows done, ``[R]`` bool; the others hold the last iterate.
    """
    smallest, largest = extremes(hessian.unsqueeze(0))
    x = warm_start(hessian.unsqueeze(0), linear.unsqueeze(0), smallest, largest).squeeze(0)
    result, done = torch.zeros_like(linear), torch.zeros(len(linear), dtype=torch.bool)
    done = done.to(linear.device)
    index = torch.arange(len(linear), device=linear.device)
    best = torch.full_like(index, linear.shape[-1] + 1)
    rows = _Rows(index, linear, x, x > 0, best, torch.full_like(best, GRACE), best < 0)
    hard = float(smallest) * HARD < float(largest)
    precondition = low_rank(hessian, ridge) if hard else None
    single = hessian.to(torch.float32)
    for _ in range(rounds):
        rows.x = rows.x * rows.free
        slack = torch.addmm(rows.linear, rows.x, hessian)
        error = (slack * rows.free).abs().amax(-1)
        tolerance = FINAL * (1 + rows.x.abs().amax(-1))
        finished = rows.clean & (error <= tolerance) & ~_wrong(rows, slack, tolerance).any(-1)
        if bool(finished.any()):
            result[rows.index[finished]] = rows.x[finished].clamp(min=0)
            done[rows.index[finished]] = True
            rows, slack = rows.take(~finished), slack[~finished]
        if not len(rows.index):
            return result, done
        _correct(rows, slack, single, precondition)
    result[rows.index] = rows.x
    return result, done


def _correct(rows: _Rows, slack: Tensor, single: Tensor, precondition: LowRank | None) -> None:
    """Move to the minimizer of each row's face, nearly, and exchange what is then wrong."""
    residual = -slack * rows.free
    scale = residual.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(slack.dtype).tiny)
    # faces of an ill-conditioned Hessian known loosely lead to wrong exchanges, dozens of them
    loose = LOOSE if precondition is None else TIGHT
    goal = torch.where(rows.clean, TIGHT, loose).unsqueeze(-1).to(torch.float32)
    unit = (residual / scale).to(torch.float32)
    inverse = None if precondition is None else precondition.on_faces(rows.free)
    step, change = conjugate_gradients(single, unit, rows.free, goal, inverse)
    rows.x = rows.x + step * scale
    slack = slack + change * scale
    # an entry is known only as well as the residual: what lies within it is left where it is
    noise = 0.1 * (slack * rows.free).abs().amax(-1)
    wrong = _wrong(rows, slack, noise.clamp(min=FINAL))
    rows.clean = ~wrong.any(-1)
    free, best, grace = exchange(rows.free, wrong, rows.best, rows.grace)
    rows.free = free
    rows.best = torch.where(rows.clean, rows.best, best)
    rows.grace = torch.where(rows.clean, rows.grace, grace)


def _wrong(rows: _Rows, slack: Tensor, tolerance: Tensor) -> Tensor:
    """Free entries that are negative and bound entries whose gradient is."""
    return torch.where(rows.free, rows.x, slack) < -tolerance.unsqueeze(-1)


def conjugate_gradients(
    hessian: Tensor,
    target: Tensor,
    free: Tensor,
    goal: Tensor,
    precondition: OnFaces | None = None,
    iterations: int = 200,
) -> tuple[Tensor, Tensor]:
    """``x`` with ``(Hx)[free] ≈ target[free]``, zero elsewhere, and ``Hx``, for all rows at once.

    ``goal [R, 1]`` is the residual wanted, relative to that of ``x = 0``; ``target`` is zero where
    it is not free.
    """
    x, product = torch.zeros_like(target), torch.zeros_like(target)
    residual = target
    direction = target if precondition is None else precondition(target) * free
    square = (residual * direction).sum(-1, keepdim=True)
    wanted = goal**2 * square
    tiny = torch.finfo(target.dtype).tiny
    for iteration in range(iterations):
        image = direction @ hessian
        active = square > wanted
        curvature = (direction * image).sum(-1, keepdim=True).clamp(min=tiny)
        length = torch.where(active, square / curvature, 0)
        x = torch.addcmul(x, length, direction)
        product = torch.addcmul(product, length, image)
        residual = torch.addcmul(residual, length, image, value=-1) * free
        near = residual if precondition is None else precondition(residual) * free
        following = (residual * near).sum(-1, keepdim=True)
        direction = near + following / square.clamp(min=tiny) * direction
        square = torch.where(active, following, square)
        if (precondition or iteration % 4 == 3) and not bool((square > wanted).any()):
            break
    return x, product


def guess_free(hessian: Tensor, linear: Tensor) -> Tensor:
    """Guess which entries of the solutions are positive; ``hessian [B, m, m]``, ``linear [B, r, m]``."""
    size = hessian.shape[-1]
    if size > TINY:
        return warm_start(hessian, linear, *extremes(hessian)) > 0
    step = torch.linalg.vector_norm(hessian, dim=(-2, -1), keepdim=True).reciprocal() * -(size**0.5)
    start = linear * step
    identity = torch.eye(size, dtype=hessian.dtype, device=hessian.device)
    matrix = torch.addcmul(identity, hessian, step)
    x = start.clamp(min=0)
    for _ in range(3):  # of projected gradient descent
        x = torch.baddbmm(start, x, matrix).clamp(min=0)
    return x > 0


def extremes(hessian: Tensor) -> tuple[Tensor, Tensor]:
    """The extreme eigenvalues of ``hessian [B, m, m]`` in float32, ``[B, 1]`` each; roughly."""
    eigenvalues = torch.linalg.eigvalsh(hessian.to(torch.float32))
    largest = eigenvalues[:, -1:]
    return torch.maximum(eigenvalues[:, :1], 1e-6 * largest), largest


def warm_start(
    hessian: Tensor, linear: Tensor, smallest: Tensor, largest: Tensor, iterations: int = 30
) -> Tensor:
    """A rough solution by over-relaxed ADMM in float32, with one inverse for all rows and iterations.

    ``hessian [B, m, m]``, ``linear [B, r, m]``; the result is rough; its signs are nearly right.
    For the eigenvalues see :func:`extremes`.
    """
    rho = (smallest * largest).sqrt().to(hessian.dtype)
    shifted = hessian + torch.diag_embed(rho.expand(-1, hessian.shape[-1]))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky_ex(shifted)[0]).to(torch.float32)
    start = linear.to(torch.float32) @ inverse * -1.6
    # with the iterate z, positive part p and dual z - p, the next is 1.6 x - 0.6 p + (z - p), where
    # x = (rho (2 p - z) - q) inverse; and 2 p - z = |z|
    identity = torch.eye(hessian.shape[-1], dtype=torch.float32, device=hessian.device)
    matrix = 1.6 * rho.to(torch.float32).unsqueeze(-1) * inverse - 0.8 * identity
    z = start
    for _ in range(iterations - 1):
        z = torch.baddbmm(torch.add(start, z, alpha=0.2), z.abs(), matrix)
    return z.clamp(min=0).to(linear.dtype)
