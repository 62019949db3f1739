"""The block that is the rows themselves."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from math import prod

import torch
from torch import Tensor


@dataclass(frozen=True)
class Dense:
    """The rows themselves: biases, norm scales, and whatever has no structure.

    Attributes:
        values: ``[K, B, *shape]``, with the ``shape`` of the parameter.
        origin: name of the op, for ``explain``; a rule leaves it empty.
    """

    values: Tensor
    origin: str = field(default="", kw_only=True, compare=False)

    @property
    def rows(self) -> tuple[int, int]:
        return self.values.shape[0], self.values.shape[1]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.values.shape[2:])

    @property
    def grain(self) -> int:
        return 1

    @property
    def kind(self) -> Hashable:
        """A key that is equal for blocks that can be joined."""
        return self.values.dtype

    def samples(self, start: int, stop: int) -> Dense:
        return replace(self, values=self.values[:, start:stop])

    def objectives(self, which: Tensor) -> Dense:
        """The block of some of the objectives."""
        return replace(self, values=self.values[which])

    @staticmethod
    def join(blocks: Sequence[Dense]) -> Dense:
        """The sum of several blocks of one kind."""
        return replace(blocks[0], values=torch.stack([block.values for block in blocks]).sum(0))

    def workspace(self, dtype: torch.dtype) -> int:
        """Elements that ``part`` needs for each sample besides its result."""
        return 0

    def part(self, start: int, stop: int, dtype: torch.dtype | None = None) -> Tensor:
        """The entries from ``start`` to ``stop`` of all rows, ``[B, K, stop - start]``."""
        some = self.values.reshape(*self.rows, -1)[:, :, start:stop]
        return some.transpose(0, 1).to(dtype or some.dtype)

    def dense(self) -> Tensor:
        """All rows, ``[K, B, *shape]``."""
        return self.values

    def matrix(self) -> Tensor:
        """``[K B, P]``, also for a parameter without dimensions."""
        return self.values.reshape(prod(self.rows), prod(self.shape))

    def vjp(self, w: Tensor) -> Tensor:
        """The weighted gradient ``Jᵀ w`` for ``w [K, B]``."""
        return w.reshape(1, -1).mm(self.matrix()).view(self.shape)

    def sketch(self, w: Tensor, y: Tensor) -> Tensor:
        """``Jᵀ w`` as a matrix of as many columns as ``y [columns, n]`` has rows, times ``y``."""
        return self.vjp(w).reshape(-1, len(y)) @ y

    def bound(self, w: Tensor) -> Tensor:
        """An upper bound of the norm of ``Jᵀ w`` that no cancellation lowers."""
        return (self.matrix().norm(dim=1) * w.abs().flatten()).sum()
