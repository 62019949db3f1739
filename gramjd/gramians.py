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


def symmetric(gramian: Tensor) -> Tensor:
    """The exactly symmetric mean of ``[K, B, K, B]`` and its mirror image (equal but for rounding)."""
    mirrored = gramian.permute(2, 3, 0, 1)
    mirrored = mirrored.clone(memory_format=torch.contiguous_format)  # a sum with strides takes far longer
    return mirrored.add_(gramian).div_(2)


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


def flatten(gramian: Tensor) -> Tensor:
    """A generalized Gramian as a matrix, whose rows are the objectives in the order of ``losses.flatten()``.

    As TorchJD from version 0.12 on has them: its weightings take it, and return flat weights, which
    ``weights.view(losses.shape)`` gives their shape.

    Args:
        gramian: ``[*S, *reversed(S)]``, perhaps with one leading batch dimension.

    Returns:
        ``[m, m]`` with ``m = prod(S)``, ``[1, 1]`` for a scalar loss; ``[n, m, m]`` of a batch.

    Raises:
        ValueError: its shape is no Gramian's.
    """
    batch, half = gramian.ndim % 2, gramian.ndim // 2
    lead, shape = gramian.shape[:batch], gramian.shape[batch : batch + half]
    if gramian.shape[batch + half :] != shape[::-1]:
        raise ValueError(
            "A generalized Gramian has shape [*shape, *reversed(shape)], with at most one leading batch "
            f"dimension; got {list(gramian.shape)}."
        )
    straight = gramian.permute([*range(batch + half), *reversed(range(batch + half, gramian.ndim))])
    return straight.reshape((*lead, prod(shape), prod(shape)))


def unflatten(matrix: Tensor, shape: Sequence[int]) -> Tensor:
    """The inverse of :func:`flatten`: the generalized Gramian of losses of a shape from the flat one.

    Args:
        matrix: ``[m, m]`` with ``m = prod(shape)``, or ``[n, m, m]``.
        shape: of the losses.

    Returns:
        ``[*shape, *reversed(shape)]``, with a leading ``n`` if the matrix has one.

    Raises:
        ValueError: the matrix is not of so many objectives.
    """
    m, half = prod(shape), len(shape)
    if matrix.ndim not in (2, 3) or matrix.shape[-2:] != (m, m):
        raise ValueError(
            f"The flat Gramian of losses of shape {list(shape)} has shape {[m, m]}, perhaps with a batch "
            f"dimension in front; got {list(matrix.shape)}."
        )
    batch = matrix.ndim - 2
    straight = matrix.reshape((*matrix.shape[:batch], *shape, *shape))
    return straight.permute([*range(batch + half), *reversed(range(batch + half, straight.ndim))])
