"""The block of a table that is looked up."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from math import prod

import torch
from torch import Tensor

from gramjd import host_memory
from gramjd.internals import is_ours


@dataclass(frozen=True)
class Lookup:
    """The block of a table lookup, such as an embedding. Its rows are ``Σ_t onehot(id_t) ⊗ c_t``.

    Attributes:
        c: cotangents, ``[K, B, T, d]``.
        ids: which rows of the table, ``[B, T]``.
        shape: of the parameter, ``[V, d]`` or reshaped from that.
        origin: name of the op, for ``explain``; a rule leaves it empty.
    """

    c: Tensor
    ids: Tensor
    shape: tuple[int, ...]
    origin: str = field(default="", kw_only=True, compare=False)

    @property
    def rows(self) -> tuple[int, int]:
        return self.c.shape[0], self.c.shape[1]

    @property
    def entries(self) -> int:
        """The number of entries ``V`` of the table."""
        return prod(self.shape) // self.grain

    @property
    def grain(self) -> int:
        return self.c.shape[-1]

    @property
    def kind(self) -> Hashable:
        """A key that is equal for blocks that can be joined."""
        return self.grain, self.c.dtype

    def samples(self, start: int, stop: int) -> Lookup:
        return replace(self, c=self.c[:, start:stop], ids=self.ids[start:stop])

    def objectives(self, which: Tensor) -> Lookup:
        """The block of some of the objectives."""
        return replace(self, c=self.c[which])

    def positions(self, start: int, stop: int) -> Lookup:
        """The block of some of the positions."""
        return replace(self, c=self.c[:, :, start:stop], ids=self.ids[:, start:stop])

    @staticmethod
    def join(blocks: Sequence[Lookup]) -> Lookup:
        """The sum of several blocks of one kind."""
        c, ids = torch.cat([block.c for block in blocks], 2), torch.cat([block.ids for block in blocks], 1)
        return replace(blocks[0], c=c, ids=ids)

    def workspace(self, dtype: torch.dtype) -> int:
        """Elements that ``part`` needs for each sample besides its result."""
        return self.c.shape[0] * self.c.shape[2] * self.grain

    def part(self, start: int, stop: int, dtype: torch.dtype | None = None) -> Tensor:
        """The entries from ``start`` to ``stop`` of all rows, ``[B, K, stop - start]``."""
        c = self.c.to(dtype or self.c.dtype)
        first, size = start // self.grain, (stop - start) // self.grain
        if (start, stop) == (0, prod(self.shape)):
            return scattered(c, self.ids, size).flatten(2)
        local = self.ids - first
        local = torch.where((local < 0) | (local >= size), size, local)  # one entry for all others
        return scattered(c, local, size + 1)[:, :, :size].flatten(2)

    def add_to(self, rows: Tensor) -> None:
        """Add all rows to a matrix of rows ``[B K, P]``, in place."""
        index, values = _flat(self.c, self.ids, self.entries)
        rows.view(-1, self.grain).index_add_(0, index, values)

    def dense(self) -> Tensor:
        """All rows, ``[K, B, *shape]``."""
        return scattered(self.c, self.ids, self.entries).transpose(0, 1).reshape(*self.rows, *self.shape)

    def vjp(self, w: Tensor) -> Tensor:
        """The weighted gradient ``Jᵀ w`` for ``w [K, B]``."""
        c = (self.c * w[:, :, None, None]).sum(0).flatten(0, 1)
        return _summed(c, self.ids.flatten(), self.entries).view(self.shape)

    def sketch(self, w: Tensor, y: Tensor) -> Tensor:
        """``Jᵀ w`` as a matrix of ``grain`` columns times ``y [grain, n]``, without forming it."""
        c = (self.c * w[:, :, None, None]).sum(0).flatten(0, 1) @ y
        return _summed(c, self.ids.flatten(), self.entries)

    def bound(self, w: Tensor) -> Tensor:
        """An upper bound of the norm of ``Jᵀ w`` that no cancellation lowers."""
        return (self.c.square().sum(-1).sqrt() * w.abs()[:, :, None]).sum()


def scattered(c: Tensor, ids: Tensor, size: int) -> Tensor:
    """``c [K, B, T, d]`` added up by ``ids [B, T]`` in tables of ``size`` entries, ``[B, K, size, d]``."""
    (K, B), d = c.shape[:2], c.shape[3]
    index, values = _flat(c, ids, size)
    return _summed(values, index, B * K * size).view(B, K, size, d)


def _flat(c: Tensor, ids: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The places ``[n]`` of cotangents ``[n, d]`` in the entries of all rows, ``[B K size, d]``."""
    K, B = c.shape[:2]
    row = torch.arange(B * K, device=c.device).view(B, K, 1) * size
    return (row + ids[:, None]).flatten(), c.transpose(0, 1).flatten(0, 2)


def _summed(values: Tensor, index: Tensor, size: int) -> Tensor:
    """``values [n, d]`` added up by ``index [n]``, ``[size, d]``; in place, where no transform may object."""
    shape = size, values.shape[1]
    if is_ours(index) and is_ours(values):
        return host_memory.empty(shape, values).zero_().index_add_(0, index, values)
    return values.new_zeros(shape).index_add(0, index, values)
