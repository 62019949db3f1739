"""Shape algebra of generalized Gramians.

An output of shape ``[m1, m2]`` has a Gramian of shape ``[m1, m2, m2, m1]``: the second half mirrors
the first. Inside the library rows are ordered ``(k, b)``: objective of a sample, then sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor


def mirror(tensor: Tensor, ndim: int) -> Tensor:
    """``[*right, *left]`` → ``[*left, *reversed(right)]``, a view; ``right`` has ``ndim`` dimensions."""
    return tensor.permute([*range(ndim, tensor.ndim), *reversed(range(ndim))])


def symmetrize(matrix: Tensor) -> Tensor:
    """The exactly symmetric mean of a square matrix and its transpose (equal but for rounding)."""
    mirrored = matrix.mT.clone(memory_format=torch.contiguous_format)  # a sum with strides takes far longer
    return mirrored.add_(matrix).div_(2)


def rows_first(tensor: Tensor, batch_dim: int | None, ndim: int | None = None) -> Tensor:
    """A tensor ``[*shape, ...]`` → ``[K, B, ...]``; ``B = 1`` without a batch dimension.

    ``ndim`` is the length of ``shape``; by default all dimensions belong to it.
    """
    ndim = tensor.ndim if ndim is None else ndim
    rest = tensor.shape[ndim:]
    if batch_dim is None:
        return tensor.reshape(-1, 1, *rest)
    straight = tensor.movedim(batch_dim, ndim - 1)
    return straight.reshape(prod(straight.shape[: ndim - 1]), tensor.shape[batch_dim], *rest)


def from_rows(rows: Tensor, shape: Sequence[int], batch_dim: int | None) -> Tensor:
    """Inverse of :func:`rows_first` for the first two dimensions: ``[K, B, ...]`` → ``[*shape, ...]``."""
    rest = rows.shape[2:]
    if batch_dim is None:
        return rows.reshape((*shape, *rest))
    batch_dim %= len(shape)
    others = [size for dim, size in enumerate(shape) if dim != batch_dim]
    return rows.reshape(*others, shape[batch_dim], *rest).movedim(len(others), batch_dim)
