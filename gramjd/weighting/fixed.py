"""Weights that ignore the values of the Gramian: mean, sum, constant, random."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from gramjd.weighting._base import Weighting
from gramjd.weighting._gramian import flat_preference, prepare
from gramjd.weighting._options import source, vector


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
    return restore(matrix.new_full(matrix.shape[:-1], 1 / max(matrix.shape[-1], 1)))


def sum(gramian: Tensor) -> Tensor:
    """A weight of one for each objective: ordinary training on the sum. See :func:`mean`."""
    matrix, restore = prepare(gramian)
    return restore(matrix.new_ones(matrix.shape[:-1]))


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

    _options: ClassVar = {}

    def forward(self, gramian: Tensor, /) -> Tensor:
        """Weights of the objectives, of their shape."""
        return mean(gramian)


class SumWeighting(Weighting):
    """:func:`sum` as an object."""

    _options: ClassVar = {}

    def forward(self, gramian: Tensor, /) -> Tensor:
        """Weights of the objectives, of their shape."""
        return sum(gramian)


class ConstantWeighting(Weighting):
    """:func:`constant` as an object.

    Args:
        weights: of the objectives' shape.
    """

    _options: ClassVar = {"weights": vector}

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

    _options: ClassVar = {"generator": source}

    def __init__(self, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.generator = generator

    def forward(self, gramian: Tensor, /) -> Tensor:
        """Weights of the objectives, of their shape."""
        return random(gramian, generator=self.generator)
