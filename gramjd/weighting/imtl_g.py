"""IMTL-G: the combination that is as long along every gradient's direction."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from gramjd.weighting._base import Weighting
from gramjd.weighting._gramian import nothing, prepare
from gramjd.weighting._small import easy, finish, impartial


def imtl_g(gramian: Tensor) -> Tensor:
    """Weights of IMTL-G: ``v / sum(v)`` with ``v = G⁺ sqrt(diag G)``.

    The weighted gradient then has the same projection on every unit gradient. Liu et al. (2021),
    "Towards Impartial Multi-task Learning", generalized with the pseudo-inverse to dependent
    gradients by Quinton and Rey, arXiv 2406.16232, Appendix B.

    Args:
        gramian: ``[*shape, *reversed(shape)]``, or a batch of these along one leading dimension.

    Returns:
        Weights of the objectives' shape and the Gramian's dtype; computed in float64, with
        eigenvalues below the rounding of the Gramian's own dtype taken for zero. They sum to one;
        all are zero where ``sum(v)`` vanishes. Differentiable where the rank is locally constant.

    Raises:
        ValueError: not a Gramian (shape, NaN, asymmetry).
    """
    small = easy(gramian)
    if small is not None:
        return finish(impartial(small, torch.finfo(gramian.dtype).eps), gramian)
    matrix, restore = prepare(gramian)
    if not matrix.numel():
        return nothing(matrix, restore, False)
    mean = matrix.detach().diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True)
    matrix = matrix / torch.where(mean > 0, mean, 1).unsqueeze(-1)
    diagonal = matrix.diagonal(dim1=-2, dim2=-1)
    norms = torch.where(diagonal > 0, torch.where(diagonal > 0, diagonal, 1).sqrt(), 0)
    tolerance = matrix.shape[-1] * torch.finfo(gramian.dtype).eps
    inverse = torch.linalg.pinv(matrix, rtol=tolerance, hermitian=True)
    v = (inverse @ norms.unsqueeze(-1)).squeeze(-1)
    total = v.sum(-1, keepdim=True)
    usable = total.abs() > 1e-12 * v.abs().sum(-1, keepdim=True)
    return restore(torch.where(usable, v / torch.where(usable, total, 1), 0))


class IMTLGWeighting(Weighting):
    """:func:`imtl_g` as an object."""

    _options: ClassVar = {}

    def forward(self, gramian: Tensor, /) -> Tensor:
        """Weights of the objectives, of their shape."""
        return imtl_g(gramian)
