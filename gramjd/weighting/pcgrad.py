"""PCGrad: from each gradient, remove its conflicts with the others, one by one."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from gramjd.weighting._base import Weighting
from gramjd.weighting._gramian import nothing, prepare
from gramjd.weighting._options import source
from gramjd.weighting._orders import random_orders


def pcgrad(gramian: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
    """Weights of PCGrad: the sum of all gradients, each projected off those it conflicts with.

    Yu et al. (2020), "Gradient Surgery for Multi-Task Learning", arXiv 2001.06782, Algorithm 1. The
    others are visited in random order; all gradients take their k-th step together.

    Args:
        gramian: ``[*shape, *reversed(shape)]``, or a batch of these along one leading dimension.
            Under ``torch.vmap``, set its ``randomness``.
        generator: source of the orders; the global one of the Gramian's device by default. On the
            CPU the same seed gives the orders of TorchJD.

    Returns:
        Weights of the objectives' shape and the Gramian's dtype; computed in float64, and
        differentiable for given orders.

    Raises:
        ValueError: not a Gramian (shape, NaN, asymmetry).
    """
    matrix, restore = prepare(gramian)
    if not matrix.numel():
        return nothing(matrix, restore, False)
    size = matrix.shape[-1]
    orders = random_orders(matrix, generator, size)
    diagonal = matrix.diagonal(dim1=-2, dim2=-1)
    identity = torch.eye(size, dtype=matrix.dtype, device=matrix.device)
    coefficients = identity.expand(matrix.shape)
    for other in orders.unbind(-1):
        partner = matrix.gather(-2, other.unsqueeze(-1).expand(matrix.shape))
        product = (coefficients * partner).sum(-1)
        length = diagonal.gather(-1, other)
        own = other == torch.arange(size, device=matrix.device)
        conflict = (product < 0) & (length > 0) & ~own
        step = torch.where(conflict, -product / torch.where(conflict, length, 1), 0)
        coefficients = coefficients + step.unsqueeze(-1) * identity[other]
    return restore(coefficients.sum(-2))


class PCGradWeighting(Weighting):
    """:func:`pcgrad` as an object.

    Args:
        generator: see :func:`pcgrad`.
    """

    _options: ClassVar = {"generator": source}

    def __init__(self, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.generator = generator

    def forward(self, gramian: Tensor, /) -> Tensor:
        """Weights of the objectives, of their shape."""
        return pcgrad(gramian, generator=self.generator)
