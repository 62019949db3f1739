"""PCD: follow the first gradient as far as every other objective gets its share of progress."""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar, Literal, overload

import torch
from torch import Tensor

from gramjd.weighting._base import StatefulWeighting
from gramjd.weighting._certificate import Certificate, certify
from gramjd.weighting._goldfarb_idnani import multipliers
from gramjd.weighting._gramian import nothing, prepare, rounding
from gramjd.weighting._opaque import opaque
from gramjd.weighting._options import not_negative, number, vector
from gramjd.weighting._semidefinite import semidefinite
from gramjd.weighting._small import nonnegative

_beta = number(0.0, 1.0, open_end=True)
_fraction = number(0.0, 1.0)


def _tau(name: str, value: Any) -> None:
    """A fraction, or a vector of them."""
    if not isinstance(value, Tensor):
        return _fraction(name, value)
    vector(name, value)
    if value.ndim != 1 or not bool(((value >= 0) & (value <= 1)).all()):
        raise ValueError(f"{name} must be in [0, 1], or a vector of such numbers; got {value}.")
    return None


# fmt: off
@overload
def pcd(gramian: Tensor, state: Tensor | None = None, *, tau: float | Tensor = ..., beta: float = ...,
        eps: float = ..., certificate: Literal[False] = False) -> tuple[Tensor, Tensor]: ...
@overload
def pcd(gramian: Tensor, state: Tensor | None = None, *, tau: float | Tensor = ..., beta: float = ...,
        eps: float = ..., certificate: Literal[True]) -> tuple[Tensor, Tensor, Certificate]: ...
# fmt: on


def pcd(
    gramian: Tensor,
    state: Tensor | None = None,
    *,
    tau: float | Tensor = 0.02,
    beta: float = 0.999,
    eps: float = 1e-8,
    certificate: bool = False,
) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Certificate]:
    """Weights of PCD, and its next state. The first objective is the primary one.

    "Not All Objectives Are Born Equal: Priority-Constrained Descent for Hierarchical Multi-Objective
    Optimization", TMLR 2026, arXiv 2606.29521. With ``s_i = (v_i + eps)^(-1/2)``, ``v_i`` the moving
    average of ``|g_i|²`` without its bias, and ``h_i = s_i g_i``, the step is, rescaled to ``|g_1|``, the
    ``d`` that minimizes ``|d - h_1|²`` over ``h_j'd >= tau |h_j|²`` for the other ``j``. Where no ``d``
    satisfies that, it is ``g_1``; where ``g_1`` or ``d`` is zero, so is it.

    Args:
        gramian: ``[*shape, *reversed(shape)]``, or a batch of these along one leading dimension.
        state: the state that the last call returned; none at first.
        tau: the progress of the others, as a fraction of that of a step along their own gradient; one
            number, or one for each objective but the first, ``[m - 1]``.
        beta: share of the old average in the next one.
        eps: added to the averages.
        certificate: also return the largest violation of the optimality conditions, in units of the
            ``|h_j|`` and relative to ``1 + Σ μ_j`` of their multipliers; or, where no ``d`` exists,
            ``|Σ r_j h_j|²`` of the combination ``r >= 0`` that proves it, relative to ``(Σ r_j |h_j|)²``.
            What the rounding of single precision or lower may leave counts as none. And do not raise if
            it is large.

    Returns:
        Weights of the objectives' shape and the Gramian's dtype, computed in float64 on the CPU;
        constants, so not differentiable. And the state, ``[..., m + 1]`` in float64: the averages, and
        how many calls they are of.

    Raises:
        ValueError: not a Gramian (shape, NaN, asymmetry, not positive semi-definite), a state or ``tau``
            of another shape, or an option out of range.
        NotConvergedError: the residual is above 1e-9.
    """
    _tau("tau", tau)
    _beta("beta", beta)
    not_negative("eps", eps)
    matrix, restore = prepare(gramian.detach() if isinstance(gramian, Tensor) else gramian)
    size = matrix.shape[-1]
    diagonal = matrix.diagonal(dim1=-2, dim2=-1)
    average, calls = _moved(state, diagonal, beta)
    following = torch.cat([average, calls], -1)
    fractions = _fractions(tau, matrix)
    if not matrix.numel():
        empty = nothing(matrix, restore, certificate)
        weights, *proof = empty if certificate else (empty,)
        return (weights, following, *proof)
    root = (average / (1 - beta**calls) + eps).sqrt()
    scale = torch.where(root > 0, 1 / torch.where(root > 0, root, 1), 0)
    precision = 10 * torch.finfo(gramian.dtype).eps
    normalized = matrix * scale.unsqueeze(-1) * scale.unsqueeze(-2)
    normalized = semidefinite(normalized, rounding(gramian.dtype))
    w, residual = opaque(partial(_each, size=size, precision=precision), normalized, fractions)
    evidence = certify(residual, not certificate, "The Gramian may be too ill-conditioned.")
    square = (w * (normalized @ w.unsqueeze(-1)).squeeze(-1)).sum(-1, keepdim=True)
    lengths = normalized.diagonal(dim1=-2, dim2=-1).sqrt()
    moving = square > precision * (w.abs() * lengths).sum(-1, keepdim=True) ** 2
    moving = moving & (diagonal[..., :1] > 0)
    factor = torch.where(moving, (diagonal[..., :1] / torch.where(moving, square, 1)).sqrt(), 0)
    weights = restore(w * scale * factor)
    return (weights, following, evidence) if certificate else (weights, following)


def _moved(state: Tensor | None, squares: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """The averages and the number of calls, ``[..., 1]``, after this one."""
    shape = (*squares.shape[:-1], squares.shape[-1] + 1)
    old = squares.new_zeros(shape) if state is None else state
    if old.shape != shape:
        raise ValueError(
            f"The state is of shape {list(old.shape)}, but that of this Gramian is {list(shape)}: start "
            "again without a state when the objectives change."
        )
    old = old.to(squares)
    return beta * old[..., :-1] + (1 - beta) * squares, old[..., -1:] + 1


def _fractions(tau: float | Tensor, matrix: Tensor) -> Tensor:
    """``tau`` for every objective but the first, ``[..., m - 1]``."""
    others = max(matrix.shape[-1] - 1, 0)
    shape = (*matrix.shape[:-2], others)
    if not isinstance(tau, Tensor):
        return matrix.new_full(shape, float(tau))
    if len(tau) != others:
        raise ValueError(f"tau is of {len(tau)} objectives, but besides the first there are {others}.")
    return tau.detach().to(matrix).expand(shape)


def _each(normalized: Tensor, fractions: Tensor, size: int, precision: float) -> tuple[Tensor, Tensor]:
    """``1, μ`` and the residual, one Gramian after the other."""
    matrices = normalized.reshape(-1, size, size).cpu()
    rows = zip(matrices, fractions.reshape(len(matrices), size - 1).cpu(), strict=True)
    found = [_one(matrix, fraction, precision) for matrix, fraction in rows]
    weights, residuals = (torch.stack(each).to(normalized.device) for each in zip(*found, strict=True))
    return weights.reshape(normalized.shape[:-1]), residuals.reshape(normalized.shape[:-2])


def _one(matrix: Tensor, fraction: Tensor, precision: float) -> tuple[Tensor, Tensor]:
    """``precision`` is what the entries of a Gramian of gradients of unit length are known to."""
    lengths = matrix.diagonal().sqrt()
    weights = torch.zeros_like(lengths)
    weights[0] = 1
    others = torch.nonzero(lengths[1:] > 0).squeeze(-1) + 1  # zero gradients constrain nothing
    if not len(others):
        return weights, matrix.new_zeros(())
    unit = lengths[others]
    inner = matrix[others][:, others] / unit / unit.unsqueeze(-1)
    inner.fill_diagonal_(1)
    bound = fraction[others - 1] * unit - matrix[others, 0] / unit
    size = max(float(bound.abs().max()), 1e-300)
    dependent = max(1e-9, precision)
    mu, ray = nonnegative(inner, -bound / size, dependent**0.5), None  # of independent ones, the quick way
    if mu is None:
        mu, ray = multipliers(inner, bound / size, dependent, max(1e-12, precision))
    known = precision if precision > 1e-12 else 0.0
    if ray is not None:
        length = (ray @ inner @ ray) / ray.sum() ** 2
        return weights, torch.where(ray @ bound > 0, (length - known).clamp(min=0), 1)
    weights[others] = size * mu / unit
    residual = torch.minimum(mu, inner @ mu - bound / size).abs().max() / (1 + mu.sum())
    return weights, (residual - known).clamp(min=0)


class PCDWeighting(StatefulWeighting):
    """:func:`pcd` as an object that keeps the state.

    Args:
        tau: see :func:`pcd`.
        beta: see :func:`pcd`.
        eps: see :func:`pcd`.
    """

    _options: ClassVar = {"tau": _tau, "beta": _beta, "eps": not_negative}
    _remembered = ("state",)
    state: Tensor | None

    def __init__(self, tau: float | Tensor = 0.02, beta: float = 0.999, eps: float = 1e-8) -> None:
        super().__init__()
        self.tau, self.beta, self.eps = tau, beta, eps
        self.register_buffer("state", None, persistent=False)

    def forward(self, gramian: Tensor, /) -> Tensor:
        """Weights of the objectives, of their shape."""
        weights, self.state = pcd(gramian, self.state, tau=self.tau, beta=self.beta, eps=self.eps)
        return weights

    def reset(self) -> None:
        """Forget the averages of earlier calls."""
        self.state = None
