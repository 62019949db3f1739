"""FairGrad: weights for an alpha-fair improvement of the objectives."""

from __future__ import annotations

from typing import ClassVar, Literal, overload

import torch
from torch import Tensor

from gramjd.weighting._balance import balance
from gramjd.weighting._base import Weighting
from gramjd.weighting._certificate import Certificate, certify
from gramjd.weighting._gramian import nothing, prepare, rounding
from gramjd.weighting._options import not_negative, unused


# fmt: off
@overload
def fairgrad(gramian: Tensor, alpha: float, *, reg_eps: float = ...,
             certificate: Literal[False] = False) -> Tensor: ...
@overload
def fairgrad(gramian: Tensor, alpha: float, *, reg_eps: float = ...,
             certificate: Literal[True]) -> tuple[Tensor, Certificate]: ...
# fmt: on


def fairgrad(
    gramian: Tensor, alpha: float, *, reg_eps: float = 1e-8, certificate: bool = False
) -> Tensor | tuple[Tensor, Certificate]:
    """Weights of FairGrad: the ``w > 0`` with ``Gw = w^(-1 / alpha)``, entry by entry.

    Ban and Ji (2024), "Fair Resource Allocation in Multi-Task Learning", arXiv 2402.15638,
    Equation 4, which has one solution and is solved exactly here.

    Args:
        gramian: ``[*shape, *reversed(shape)]``, or a batch of these along one leading dimension.
        alpha: kind of fairness: 0 gives ``1 / m`` each, 1 proportional fairness (NashMTL without
            its scaling), large values max-min fairness.
        reg_eps: relative increase of the diagonal. Without it, gradients of which some combination
            vanishes have no solution; with it, its weights are large but finite. The weight of a
            zero gradient has no meaning, and is that of a gradient of mean norm orthogonal to all.
        certificate: also return the residual of the equation, relative to what its terms would sum
            to if none cancelled, and do not raise if it is large.

    Returns:
        Weights of the objectives' shape and the Gramian's dtype; computed in float64.

    Raises:
        ValueError: not a Gramian (shape, NaN, asymmetry, not positive semi-definite), or a negative
            argument.
        NotConvergedError: the residual is above 1e-9.
    """
    not_negative("alpha", alpha)
    not_negative("reg_eps", reg_eps)
    matrix, restore = prepare(gramian)
    if not matrix.numel():
        return nothing(matrix, restore, certificate)
    if alpha == 0:
        weights = torch.full_like(matrix[..., 0], 1 / matrix.shape[-1])
        residual = torch.zeros_like(weights[..., 0])
    else:
        weights, residual = balance(matrix, 1 / alpha, reg_eps, rounding(gramian.dtype))
    evidence = certify(residual, not certificate, "Raise reg_eps, or use a larger alpha.")
    return (restore(weights), evidence) if certificate else restore(weights)


class FairGradWeighting(Weighting):
    """:func:`fairgrad` as an object.

    Args:
        alpha: see :func:`fairgrad`.
        max_iters: TorchJD's. The solution is exact: anything but the default is refused.
        reg_eps: see :func:`fairgrad`.
    """

    _options: ClassVar = {"alpha": not_negative, "max_iters": unused(None), "reg_eps": not_negative}

    def __init__(self, alpha: float, max_iters: int | None = None, *, reg_eps: float = 1e-8) -> None:
        super().__init__()
        self.alpha, self.max_iters, self.reg_eps = alpha, max_iters, reg_eps

    def forward(self, gramian: Tensor, /) -> Tensor:
        """Weights of the objectives, of their shape."""
        return fairgrad(gramian, self.alpha, reg_eps=self.reg_eps)
