"""NashMTL: the bargaining solution among the gradients."""

from __future__ import annotations

from typing import ClassVar, Literal, overload

import torch
from torch import Tensor

from gramjd.weighting._balance import balance
from gramjd.weighting._base import StatefulWeighting
from gramjd.weighting._certificate import Certificate, certify
from gramjd.weighting._gramian import nothing, prepare, rounding
from gramjd.weighting._options import count, not_negative, unused


# fmt: off
@overload
def nash_mtl(gramian: Tensor, max_norm: float = ..., *, reg_eps: float = ...,
             certificate: Literal[False] = False) -> Tensor: ...
@overload
def nash_mtl(gramian: Tensor, max_norm: float = ..., *, reg_eps: float = ...,
             certificate: Literal[True]) -> tuple[Tensor, Certificate]: ...
# fmt: on


def nash_mtl(
    gramian: Tensor, max_norm: float = 1.0, *, reg_eps: float = 1e-8, certificate: bool = False
) -> Tensor | tuple[Tensor, Certificate]:
    """Weights of NashMTL: the ``w > 0`` with ``(G / |G|) w = 1 / w``, ``|G|`` the Frobenius norm.

    Navon et al. (2022), "Multi-Task Learning as a Bargaining Game", arXiv 2202.01017, Claim 3.1,
    which has one solution and is solved exactly here, where the paper and TorchJD approximate it by
    a few linearizations. Dividing by ``|G|`` is what their code does.

    Args:
        gramian: ``[*shape, *reversed(shape)]``, or a batch of these along one leading dimension.
        max_norm: limit on the weighted gradient's norm, kept by scaling the weights; 0 for none.
        reg_eps: relative increase of the diagonal. Without it, gradients of which some combination
            vanishes have no bargaining solution; with it, its weights are large but finite. The
            weight of a zero gradient has no meaning, and is that of a gradient of mean norm
            orthogonal to all.
        certificate: also return the residual of the equation, relative to what its terms would sum
            to if none cancelled, and do not raise if it is large.

    Returns:
        Weights of the objectives' shape and the Gramian's dtype; computed in float64.

    Raises:
        ValueError: not a Gramian (shape, NaN, asymmetry, not positive semi-definite).
        NotConvergedError: the residual is above 1e-9.
    """
    not_negative("max_norm", max_norm)
    not_negative("reg_eps", reg_eps)
    matrix, restore = prepare(gramian)
    if not matrix.numel():
        return nothing(matrix, restore, certificate)
    frobenius = torch.linalg.matrix_norm(matrix).unsqueeze(-1)
    frobenius = torch.where(frobenius > 0, frobenius, 1)
    weights, residual = balance(matrix, 1.0, reg_eps, rounding(gramian.dtype))
    evidence = certify(residual, not certificate, "Raise reg_eps.")
    result = restore(_limit_norm(weights * frobenius.sqrt(), matrix, max_norm))
    return (result, evidence) if certificate else result


def _limit_norm(weights: Tensor, matrix: Tensor, max_norm: float) -> Tensor:
    """Scale the weights down such that ``w'Gw`` is at most the square of ``max_norm``."""
    square = (weights * (matrix @ weights.unsqueeze(-1)).squeeze(-1)).sum(-1, keepdim=True)
    over = (square > max_norm**2) & (max_norm > 0)
    return weights * torch.where(over, max_norm * torch.where(over, square, 1).rsqrt(), 1)


class NashMTLWeighting(StatefulWeighting):
    """:func:`nash_mtl` as an object with the arguments of TorchJD's ``NashMTL``.

    Args:
        n_tasks: number of objectives, checked at every call.
        max_norm: see :func:`nash_mtl`.
        update_weights_every: solve at every so many calls, and in between use the last solution,
            limited to ``max_norm`` anew.
        optim_niter: TorchJD's. The solution is exact: anything but the default is refused.
        reg_eps: see :func:`nash_mtl`.
    """

    _options: ClassVar = {
        "n_tasks": count(1),
        "max_norm": not_negative,
        "update_weights_every": count(1),
        "optim_niter": unused(20),
        "reg_eps": not_negative,
    }

    _remembered = ("weights", "calls")
    weights: Tensor | None
    calls: int = 0

    def __init__(
        self,
        n_tasks: int,
        max_norm: float = 1.0,
        update_weights_every: int = 1,
        optim_niter: int = 20,
        *,
        reg_eps: float = 1e-8,
    ) -> None:
        super().__init__()
        self.n_tasks, self.max_norm, self.reg_eps = n_tasks, max_norm, reg_eps
        self.update_weights_every, self.optim_niter = update_weights_every, optim_niter
        self.register_buffer("weights", None, persistent=False)

    def forward(self, gramian: Tensor, /) -> Tensor:
        """Weights of the objectives, of their shape."""
        matrix, restore = prepare(gramian)
        if matrix.shape[-1] != self.n_tasks:
            raise ValueError(
                f"n_tasks is {self.n_tasks}, but the Gramian is of {matrix.shape[-1]} objectives."
            )
        weights = self.weights
        if weights is None or self.calls % self.update_weights_every == 0:
            weights = nash_mtl(gramian, 0.0, reg_eps=self.reg_eps)
            self.weights = weights.detach()
        self.calls += 1
        flat = weights.reshape(matrix.shape[:-1]).to(matrix)
        return restore(_limit_norm(flat, matrix, self.max_norm))

    def reset(self) -> None:
        """Solve again at the next call."""
        self.weights, self.calls = None, 0
