"""The dual cone of more gradients than they have entries, ``F [m, n]`` with ``n < m`` (UPGrad, DualProj).

For ``H = FFᵀ + diag(r)``, ``min_x xᵀHx / 2 + qᵀx`` over ``x >= 0`` has a dual program without constraints in
``n`` unknowns, which are ``z = Fᵀx`` at the solution: the ``z`` that minimizes

    |z|² / 2 + Σ_i r_i x_i(z)² / 2   with   x_i(z) = max(0, -(Fz + q)_i / r_i).

It is convex and piecewise quadratic, its gradient is ``z - Fᵀx(z)``, and on a piece its Hessian is
``I + Fᵀ diag(a / r) F``, where ``a`` marks the positive entries of ``x``. Newton's method with a line search
ends after finitely many steps (semismooth Newton; the primal-dual active set method). No ``[m, m]`` occurs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gramjd.weighting._options import positive

ROUNDS, EXACT_ROUNDS = 40, 200
FINAL = 1e-12  # norm of the dual gradient at which a row is done; it bounds the KKT residual
ENOUGH, PATIENCE = 1e-10, 3  # at which it is done, too, if so many rounds have not halved it: rounding
GOAL = 1e-3  # what one call of conjugate gradients reduces the dual gradient to
MEMORY = 2**20  # elements of a tensor for several rows
SUFFICIENT = 1e-4  # share of the decrease that the slope promises


@dataclass(frozen=True)
class Cone:
    """``R = FFᵀ + diag(r)``: the Gramian over its trace, plus ``reg_eps I``, scaled to unit diagonal."""

    factor: Tensor  # [m, n], float64
    ridge: Tensor  # [m]
    scale: Tensor  # [m]

    @staticmethod
    def of(rows: Tensor, norm_eps: float, reg_eps: float) -> Cone:
        """The cone of ``rows [m, n]`` in float64; a trace below ``norm_eps`` counts as zero."""
        positive("reg_eps of a sketched Gramian", reg_eps)
        trace = rows.square().sum()
        smallest = max(norm_eps, torch.finfo(trace.dtype).tiny)
        rows = rows * ((trace >= smallest) / trace.clamp(min=smallest)).sqrt()
        scale = (rows.square().sum(-1) + reg_eps).rsqrt()
        return Cone(rows * scale.unsqueeze(-1), reg_eps * scale**2, scale)

    def image(self, x: Tensor) -> Tensor:
        """The product ``x R`` for ``x [k, m]``."""
        return torch.addcmul((x @ self.factor) @ self.factor.mT, x, self.ridge)

    def units(self, start: int, stop: int) -> Tensor:
        """Some rows of ``R``."""
        found = self.factor[start:stop] @ self.factor.mT
        found[:, start:stop].diagonal().add_(self.ridge[start:stop])
        return found

    @property
    def step(self) -> int:
        """Rows that are solved for at once."""
        return max(1, MEMORY // len(self.factor))


def combined_units(cone: Cone, share: Tensor) -> tuple[Tensor, Tensor]:
    """``Σ_i share_i v_i [m]`` of the ``v_i >= e_i`` that minimize ``vᵀRv``, and the largest KKT residual."""
    total, worst = share.clone(), share.new_zeros(())
    wanted = share.nonzero().squeeze(-1)
    for start in range(0, len(share), cone.step):
        stop = min(start + cone.step, len(share))
        mine = wanted[(wanted >= start) & (wanted < stop)]
        if len(mine):
            linear = cone.units(start, stop)[mine - start]
            x = solve(cone, linear)
            total = total + share[mine] @ x
            worst = torch.maximum(worst, _residual(cone, linear, x))
    return total, worst


def project_onto(cone: Cone, target: Tensor) -> tuple[Tensor, Tensor]:
    """The ``v >= u [m]`` that minimizes ``vᵀRv``, and the KKT residual."""
    size = target.abs().amax().clamp(min=torch.finfo(target.dtype).tiny)
    unit = (target / size).unsqueeze(0)  # the solution scales with u
    linear = cone.image(unit)
    growth = linear.abs().amax().clamp(min=1)  # residuals are relative to that
    x = solve(cone, linear / growth)
    return size * (unit + growth * x).squeeze(0), _residual(cone, linear / growth, x)


def _residual(cone: Cone, linear: Tensor, x: Tensor) -> Tensor:
    return torch.minimum(x, cone.image(x) + linear).abs().max()


def solve(cone: Cone, linear: Tensor) -> Tensor:
    """``x [k, m]`` for ``q [k, m]``, whose rows are of order one; the caller looks at the residual."""
    if len(linear) == 1:
        return _exactly(cone, linear[0]).unsqueeze(0)
    z, done = _together(cone, linear)
    x = _point(cone, _slack(cone, linear, z))
    for row in (~done).nonzero().squeeze(-1).tolist():
        x[row] = _exactly(cone, linear[row], z[row])
    return x


def _slack(cone: Cone, linear: Tensor, z: Tensor) -> Tensor:
    return torch.addmm(linear, z, cone.factor.mT)


def _point(cone: Cone, slack: Tensor) -> Tensor:
    return (slack / -cone.ridge).clamp(min=0)


def _exactly(cone: Cone, linear: Tensor, z: Tensor | None = None) -> Tensor:
    """``x [m]`` for one ``q [m]``, with a factorization for each step."""
    linear = linear.unsqueeze(0)
    z = (linear.new_zeros(cone.factor.shape[1]) if z is None else z).unsqueeze(0)
    identity = torch.eye(z.shape[-1], dtype=z.dtype, device=z.device)
    best, smallest, stale = torch.zeros_like(linear), torch.inf, 0
    for _ in range(EXACT_ROUNDS):
        slack = _slack(cone, linear, z)
        x = _point(cone, slack)
        gradient = z - x @ cone.factor
        size = float(gradient.norm())
        stale = 0 if size <= smallest / 2 else stale + 1
        if size < smallest:
            best, smallest = x, size
        if size <= FINAL * (1 + float(x.max())) or (smallest <= ENOUGH and stale > PATIENCE):
            break
        face = cone.factor[x[0] > 0]
        curvature = identity + (face / cone.ridge[x[0] > 0].unsqueeze(-1)).mT @ face
        direction = -torch.cholesky_solve(gradient.mT, torch.linalg.cholesky(curvature)).mT
        length = _length(cone, slack, z, x, gradient, direction)
        if not float(length):
            break
        z = z + length * direction
    return best[0]


def _together(cone: Cone, linear: Tensor) -> tuple[Tensor, Tensor]:
    """``z [k, n]`` for ``q [k, m]``, by conjugate gradients on all rows at once, and which are done."""
    z, done = linear.new_zeros(len(linear), cone.factor.shape[1]), linear.new_zeros(len(linear)) > 0
    left = torch.arange(len(linear), device=linear.device)
    single = Cone(*(t.to(torch.float32) for t in (cone.factor, cone.ridge, cone.scale)))
    smallest, stale = torch.full_like(linear[:, 0], torch.inf), torch.zeros_like(left)
    for _ in range(ROUNDS):
        slack = _slack(cone, linear[left], z[left])
        x = _point(cone, slack)
        gradient = z[left] - x @ cone.factor
        size = gradient.norm(dim=-1)
        stale[left] = torch.where(size <= smallest[left] / 2, 0, stale[left] + 1)
        smallest[left] = torch.minimum(size, smallest[left])
        finished = size <= torch.where(stale[left] > PATIENCE, ENOUGH, FINAL * (1 + x.amax(-1)))
        done[left[finished]] = True
        left, slack, x, gradient = (t[~finished] for t in (left, slack, x, gradient))
        if not len(left):
            break
        direction = _newton(single, x > 0, gradient)
        z[left] += _length(cone, slack, z[left], x, gradient, direction) * direction
    return z, done


def _newton(single: Cone, free: Tensor, gradient: Tensor) -> Tensor:
    """Nearly ``-(I + Fᵀ diag(a / r) F)⁻¹ g`` of each row, preconditioned by the mean of these matrices."""
    scale = gradient.norm(dim=-1, keepdim=True)
    target = (gradient / -scale).to(torch.float32)
    weights = free / single.ridge
    mean = torch.eye(target.shape[-1], dtype=target.dtype, device=target.device)
    mean = mean + (single.factor * weights.mean(0).unsqueeze(-1)).mT @ single.factor
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(mean))
    x, residual = torch.zeros_like(target), target
    near = residual @ inverse
    direction, square = near, (residual * near).sum(-1, keepdim=True)
    for _ in range(50):
        image = direction + ((direction @ single.factor.mT) * weights) @ single.factor
        active = residual.norm(dim=-1, keepdim=True) > GOAL
        if not bool(active.any()):
            break
        length = torch.where(active, square / (direction * image).sum(-1, keepdim=True), 0)
        x = torch.addcmul(x, length, direction)
        residual = torch.addcmul(residual, length, image, value=-1)
        near = residual @ inverse
        following = (residual * near).sum(-1, keepdim=True)
        direction = near + following / square * direction
        square = torch.where(active, following, square)
    return x.to(gradient.dtype) * scale


def _length(cone: Cone, slack: Tensor, z: Tensor, x: Tensor, gradient: Tensor, direction: Tensor) -> Tensor:
    """``[k, 1]``: the first of 1, 1/2, 1/4 … that decreases the dual enough along a direction."""
    slope = (gradient * direction).sum(-1, keepdim=True)
    along, half = (z * direction).sum(-1, keepdim=True), direction.square().sum(-1, keepdim=True) / 2
    change = direction @ cone.factor.mT
    length, fits = torch.ones_like(slope), slope >= 0
    for _ in range(40):
        moved = _point(cone, torch.addcmul(slack, length, change))
        gained = ((moved - x) * (moved + x) @ cone.ridge).unsqueeze(-1) / 2
        difference = length * along + length**2 * half + gained
        fits = fits | (difference <= SUFFICIENT * length * slope) | (slope.abs() < FINAL**2)
        if bool(fits.all()):
            return length
        length = torch.where(fits, length, length / 2)
    return torch.where(fits, length, 0)
