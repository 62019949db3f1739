"""Differentiable solutions of linear systems on a face: the derivatives of every solver here.

By the implicit function theorem, while the active set stays the same, the solution of a quadratic
program moves like the solution of ``(Hx)[free] = target[free]`` with ``x = 0`` elsewhere.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gramjd.weighting._certificate import NotConvergedError
from gramjd.weighting._opaque import batched, is_constant, opaque
from gramjd.weighting._pivoting import CHUNK, SMALL
from gramjd.weighting._shared_hessian import conjugate_gradients

DEPENDENT = 1e-6  # sine of the angle below which a gradient counts as a combination of others


def on_face(hessian: Tensor, target: Tensor, free: Tensor, x: Tensor) -> Tensor:
    """The known solution ``x [..., r, m]``, as a function of ``H [..., m, m]`` and the target."""
    return x if is_constant(hessian, target) else _OnFace.apply(hessian, target, free, x)


class _OnFace(torch.autograd.Function):
    """Derivatives of any order and direction: ``H dx = dtarget - dH x`` on the face."""

    @staticmethod
    def forward(hessian: Tensor, target: Tensor, free: Tensor, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        hessian, _, free, _ = inputs
        ctx.save_for_backward(hessian, free, output)
        ctx.save_for_forward(hessian, free, output)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *tensors: Tensor) -> tuple[Tensor, int]:
        return _OnFace.apply(*batched(info, in_dims, *tensors)), 0

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Any:
        hessian, free, x = ctx.saved_tensors
        adjoint = solve(hessian, cotangent, free)
        return -adjoint.mT @ x, adjoint, None, None

    @staticmethod
    def jvp(ctx: Any, hessian_t: Any, target_t: Any, *_: Any) -> Tensor:
        hessian, free, x = ctx.saved_tensors
        right = torch.zeros_like(x) if target_t is None else target_t
        return solve(hessian, right if hessian_t is None else right - x @ hessian_t, free)


def solve(hessian: Tensor, target: Tensor, free: Tensor) -> Tensor:
    """Solve ``(Hx)[free] = target[free]``, ``x = 0`` elsewhere; differentiable again.

    Raises:
        NotConvergedError: the face is singular, so the solution has no derivative.
    """
    return on_face(hessian, target, free, opaque(_solve, hessian, target, free))


def _solve(hessian: Tensor, target: Tensor, free: Tensor) -> Tensor:
    shape = target.shape
    matrices = hessian.reshape(-1, shape[-1], shape[-1])
    scale = target.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(target.dtype).tiny)
    unit = (target / scale * free).reshape(-1, *shape[-2:])
    faces = zip(matrices, unit, free.reshape(unit.shape), strict=True)
    x = torch.stack([_solve_faces(*one) for one in faces])
    return x.reshape(shape) * scale


def _solve_faces(hessian: Tensor, target: Tensor, free: Tensor) -> Tensor:
    """``[m, m]``, ``[r, m]``: conjugate gradients, and exact factors where they do not converge."""
    if len(target) <= 4 or len(hessian) <= SMALL:
        return _factor_faces(hessian, target, free)
    goal = torch.full_like(target[:, :1], 1e-13)
    x, product = conjugate_gradients(hessian, target, free, goal)
    failed = ((product - target) * free).norm(dim=-1) > 1e-10 * target.norm(dim=-1)
    if bool(failed.any()):
        x[failed] = _factor_faces(hessian, target[failed], free[failed])
    return x


def _factor_faces(hessian: Tensor, target: Tensor, free: Tensor) -> Tensor:
    step = max(1, CHUNK // hessian.numel())
    norms = hessian.diagonal().sqrt()
    identity = torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
    solutions = []
    for some, face in zip(target.split(step), free.split(step), strict=True):
        both = face.unsqueeze(-1) & face.unsqueeze(-2)
        factor = torch.linalg.cholesky_ex(torch.where(both, hessian, identity))[0]
        pivots = factor.diagonal(dim1=-2, dim2=-1) / torch.where(face, norms, 1)
        if not bool((pivots > DEPENDENT).all()):
            raise NotConvergedError(
                "The weights have no derivative here: the gradients that determine them are "
                "linearly dependent. Use torch.no_grad(), or regularize the Gramian."
            )
        solutions.append(torch.cholesky_solve(some.unsqueeze(-1), factor).squeeze(-1))
    return torch.cat(solutions)
