"""Shape helpers of the rules: canonical tensors in, factors of blocks out."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from gramjd.blocks import Dense, Outer


def sum_to(c: Tensor, shape: Sequence[int]) -> Tensor:
    """``[K, B, *y]`` summed over the dimensions along which ``shape`` was broadcast to ``y``."""
    extra = c.ndim - 2 - len(shape)
    dims = [d for d in range(2, 2 + extra) if c.shape[d] != 1]  # else a view of the cotangents
    dims += [2 + extra + d for d, size in enumerate(shape) if size == 1 and c.shape[2 + extra + d] != 1]
    found, size = c.sum(dims) if dims else c, (*c.shape[:2], *shape)
    return found if found.shape == size else found.reshape(size)


def outer(c: Tensor, a: Tensor, weight: Tensor, transposed: bool = False) -> Outer:
    """``c [K, B, *L, o]`` and ``a [B, *L, i]`` → a block at ``T = prod(L)`` positions."""
    positions = prod(c.shape[2:-1])
    c = c.reshape(*c.shape[:2], positions, 1, c.shape[-1])
    a = a.reshape(a.shape[0], positions, 1, a.shape[-1])
    return Outer(c, a, tuple(weight.shape), transposed)


def times(c: Tensor, other: Tensor | float) -> Tensor:
    """``c [K, B, *y]`` times a number or what broadcasts against ``y`` for each sample, ``[B, ...]``."""
    if isinstance(other, Tensor) and other.ndim < c.ndim - 1:  # line the sample dimension up with that of c
        other = other.reshape(other.shape[0], *[1] * (c.ndim - 1 - other.ndim), *other.shape[1:])
    found = c * other
    if found.shape != c.shape:  # a factor of the op is never larger than its output
        raise ValueError("a parameter has entries of several samples where the output has one sample's")
    return found


def broadcast_rows(c: Tensor, other: Tensor | float | None, param: Tensor) -> Dense:
    """Rows ``Σ c · other`` of a parameter that was broadcast against ``other [B, *shape]``."""
    return Dense(sum_to(c if other is None else times(c, other), param.shape))


def tuple_of(value: int | Sequence[int], n: int) -> tuple[int, ...]:
    """A convolution option as one number per spatial dimension."""
    if isinstance(value, int):
        return (value,) * n
    return tuple(value) * n if len(value) == 1 else tuple(value)


def pad_like(
    x: Tensor, padding: str | int | Sequence[int], kernel: Sequence[int], dilation: Sequence[int]
) -> Tensor:
    """``x`` zero-padded as a convolution with this ``padding`` would."""
    n = len(kernel)
    if padding == "valid":
        return x
    if padding == "same":  # torch puts the odd one at the end
        total = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        sides = [(t // 2, t - t // 2) for t in total]
    else:
        assert not isinstance(padding, str)
        sides = [(p, p) for p in tuple_of(padding, n)]
    flat = [p for side in reversed(sides) for p in side]
    return torch.nn.functional.pad(x, flat) if any(flat) else x
