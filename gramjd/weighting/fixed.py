"""Weights that ignore the values of the Gramian: mean, sum, constant, random."""

from __future__ import annotations

import torch
from torch import Tensor

from gramjd.weighting._base import Weighting
from gramjd.weighting._gramian import flat_preference, prepare


def mean(gramian: Tensor) -> Tensor:
    """``1 / m`` for each of the ``m`` objectives: ordinary training on the mean.

    Args:
        gramian: ``[*shape, *reversed(shape)]``, or a batch of these along one leading dimension.

    Returns:
        Weights of the objectives' shape and the Gramian's dtype.

    Raises:
        ValueError: not a Gramian (shape, NaN, asymmetry).
    """
    matrix, restore = prepare(gramian)
    return restore(torch.full_like(matrix[..., 0], 1 / matrix.shape[-1], requires_grad=False))


def sum(gramian: Tensor) -> Tensor:
    """One for each objective: ordinary training on the sum. See :func:`mean`."""
    matrix, restore = prepare(gramian)
    return restore(torch.ones_like(matrix[..., 0], requires_grad=False))


def constant(gramian: Tensor, weights: Tensor) -> Tensor:
    """The given weights, of the objectives' shape.

    Args:
        gramian: ``[*shape, *reversed(shape)]``, or a batch of these along one leading dimension.
        weights: of ``shape``, or one such for each Gramian of the batch.

    Returns:
        Weights of the objectives' shape and the Gramian's dtype.

    Raises:
        ValueError: not a Gramian (shape, NaN, asymmetry), or weights of another shape.
    """
    matrix, restore = prepare(gramian)
    return restore(flat_preference(weights, matrix, gramian).expand(matrix.shape[:-1]))


def random(gramian: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
    """Positive random weights that sum to one: the softmax of independent normal numbers.

    Lin et al. (2022), "Reasonable Effectiveness of Random Weighting", arXiv 2111.10603,
    Algorithm 2.

    Args:
        gramian: ``[*shape, *reversed(shape)]``, or a batch of these along one leading dimension.
            Under ``torch.vmap``, set its ``randomness``.
        generator: source of the numbers; the global one of the Gramian's device by default. The
            same seed gives TorchJD's weights.

    Returns:
        Weights of the objectives' shape and the Gramian's dtype.

    Raises:
        ValueError: not a Gramian (shape, NaN, asymmetry).
    """
    matrix, restore = prepare(gramian)
    device = matrix.device if generator is None else generator.device
    shape = matrix.shape[:-1]
    normal = torch.randn(shape, generator=generator, device=device, dtype=gramian.dtype)
    return restore(normal.to(matrix.device).softmax(-1))


class MeanWeighting(Weighting):
    """:func:`mean` as an object."""

    def forward(self, gramian: Tensor, /) -> Tensor:
        """Weights of the objectives, of their shape."""
        return mean(gramian)


class SumWeighting(Weighting):
    """:func:`sum` as an object."""

    def forward(self, gramian: Tensor, /) -> Tensor:
        """Weights of the objectives, of their shape."""
        return sum(gramian)


class ConstantWeighting(Weighting):
    """:func:`constant` as an object.

    Args:
        weights: of the objectives' shape.
    """

    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        self.weights = weights

    def forward(self, gramian: Tensor, /) -> Tensor:
        """Weights of the objectives, of their shape."""
        return constant(gramian, self.weights)


class RandomWeighting(Weighting):
    """:func:`random` as an object.

    Args:
        generator: see :func:`random`.
    """

    def __init__(self, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.generator = generator

    def forward(self, gramian: Tensor, /) -> Tensor:
        """Weights of the objectives, of their shape."""
        return random(gramian, generator=self.generator)
