"""Krum: the gradients nearest to most of the others."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from gramjd.weighting._base import Weighting
from gramjd.weighting._gramian import nothing, prepare
from gramjd.weighting._options import count


def krum(gramian: Tensor, n_byzantine: int, n_selected: int = 1) -> Tensor:
    """Weights of Multi-Krum: ``1 / n_selected`` for the gradients with the best score, else zero.

    The score is the sum of distances to the ``m - n_byzantine - 2`` nearest others. Blanchard et
    al. (2017), "Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent", Section 4,
    with distances for squared distances, as in TorchJD.

    Args:
        gramian: ``[*shape, *reversed(shape)]``, or a batch of these along one leading dimension.
        n_byzantine: how many gradients may be adversarial.
        n_selected: how many gradients to average.

    Returns:
        Weights of the objectives' shape and the Gramian's dtype. Constant, so not differentiable.

    Raises:
        ValueError: not a Gramian (shape, NaN, asymmetry), fewer than ``n_byzantine + 3`` or
            ``n_selected`` objectives, or numbers out of range.
    """
    count(0)("n_byzantine", n_byzantine)
    count(1)("n_selected", n_selected)
    matrix, restore = prepare(gramian.detach() if isinstance(gramian, Tensor) else gramian)
    if not matrix.numel():
        return nothing(matrix, restore, False)
    size = matrix.shape[-1]
    if size < max(n_byzantine + 3, n_selected):
        raise ValueError(
            f"Krum needs at least n_byzantine + 3 = {n_byzantine + 3} objectives, and at least "
            f"n_selected = {n_selected}; the Gramian has {size}."
        )
    squares = matrix.diagonal(dim1=-2, dim2=-1)
    distances = squares.unsqueeze(-1) + squares.unsqueeze(-2) - 2 * matrix
    itself = torch.eye(size, dtype=torch.bool, device=matrix.device)
    distances = torch.where(itself, 0, distances.clamp(min=0).sqrt())
    scores = distances.topk(size - n_byzantine - 1, largest=False).values.sum(-1)
    chosen = scores.topk(n_selected, largest=False).indices
    return restore(torch.zeros_like(scores).scatter(-1, chosen, 1 / n_selected))


class KrumWeighting(Weighting):
    """:func:`krum` as an object.

    Args:
        n_byzantine: see :func:`krum`.
        n_selected: see :func:`krum`.
    """

    _options: ClassVar = {"n_byzantine": count(0), "n_selected": count(1)}

    def __init__(self, n_byzantine: int, n_selected: int = 1) -> None:
        super().__init__()
        self.n_byzantine, self.n_selected = n_byzantine, n_selected

    def forward(self, gramian: Tensor, /) -> Tensor:
        """Weights of the objectives, of their shape."""
        return krum(gramian, self.n_byzantine, self.n_selected)
