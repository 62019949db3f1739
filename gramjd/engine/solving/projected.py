"""The gradients and cotangents of a weighted pass; of large ones, only random projections are kept.

All gradients of a model, or all cotangents of a forward, take as much memory as the model or the forward; the
products take a fraction of it. Sums and comparisons of two tensors are those of their products. By these, a
difference looks ten times smaller than it is with a probability of about 1e-7.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import isfinite, prod

import torch
from torch import Tensor

from gramjd.blocks import Block, Dense
from gramjd.complexes import as_real

_VECTORS = 8
_SMALL_GRADIENT = 4096  # entries of a gradient that is kept as it is
_SMALL_COTANGENT = 2**16  # the same of a cotangent
_FEATURES = 64  # entries in the last dimension, below which a cotangent is kept as it is


@dataclass(frozen=True)
class Gradient:
    """The gradient of a parameter: a vector, or its matrix of ``columns`` columns times random vectors."""

    values: Tensor  # [entries], or [rows, _VECTORS]
    columns: int  # 0: the values are the gradient's own
    size: float  # its norm
    is_finite: bool

    @staticmethod
    def of(gradient: Tensor) -> Gradient:
        """Keep a gradient, projected if it is large."""
        if gradient.is_sparse:  # of Embedding(sparse=True)
            gradient = gradient.to_dense()
        wide = torch.float32 if gradient.dtype in (torch.float16, torch.bfloat16) else None
        size = float(torch.linalg.vector_norm(gradient, dtype=wide))
        finite = isfinite(size) or bool(torch.isfinite(gradient).all())
        columns = prod(gradient.shape[1:]) if gradient.numel() > _SMALL_GRADIENT else 0
        if columns < 2 * _VECTORS:
            return Gradient(gradient.flatten(), 0, size, finite)
        return Gradient(gradient.reshape(-1, columns) @ _vectors(columns, gradient), columns, size, finite)

    def less(self, blocks: Sequence[Block], weights: Tensor) -> Tensor:
        """Return the values minus those of ``Jᵀ w``, computed from the blocks."""
        left = self.values
        if not self.columns:
            for block in blocks:
                left = left - block.vjp(weights).flatten()
            return left
        y = _vectors(self.columns, left)
        for block in blocks:
            known = block.grain == self.columns or isinstance(block, Dense)
            left = left - (block.sketch(weights, y) if known else block.vjp(weights).reshape(-1, len(y)) @ y)
        return left

    def norm(self, values: Tensor) -> float:
        """The norm of a gradient that has such values."""
        return _scale(self.columns) * float(as_real(values).double().norm())


@dataclass(frozen=True)
class Probed:
    """The cotangent of one output of a node; its last dimension may be that of products."""

    values: Tensor  # [*y], or [*y[:-1], _VECTORS]
    features: int = 0  # of the last dimension of y, where the values are products

    @staticmethod
    def of(cotangent: Tensor) -> Probed:
        """Keep a cotangent, projected if it is large."""
        large = cotangent.ndim > 1 and cotangent.numel() > _SMALL_COTANGENT
        if not large or cotangent.shape[-1] < _FEATURES:
            return Probed(cotangent)
        features = cotangent.shape[-1]
        return Probed(cotangent @ _vectors(features, cotangent), features)

    def alike(self, c: Tensor) -> Tensor:
        """Cotangents ``[K, *y]`` of the same output as this one is kept."""
        return c @ _vectors(self.features, c) if self.features else c

    @cached_property
    def norm(self) -> float:
        """The norm of the cotangent."""
        return _scale(self.features) * float(self.values.norm())

    @property
    def is_finite(self) -> bool:
        """Whether all entries are finite. A norm is many times as fast as ``isfinite``."""
        return isfinite(self.norm) or bool(torch.isfinite(self.values).all())


def _vectors(length: int, like: Tensor) -> Tensor:
    """Random vectors ``[length, _VECTORS]`` of entries so small that no product overflows."""
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(length, _VECTORS, generator=generator) / length**0.5).to(like)


def _scale(length: int) -> float:
    """The norm of a tensor in norms of its products."""
    return (length / _VECTORS) ** 0.5 if length else 1.0
