"""The block of a linear map: sums of outer products."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from gramjd import host_memory


@dataclass(frozen=True)
class Outer:
    """Row ``Σ_t c_t ⊗ a_t``: linear, matmul, addmm; a convolution after unfolding.

    Attributes:
        c: cotangents, ``[K, B, T, G, o]``.
        a: activations, ``[B, T, G, i]``.
        shape: of the parameter.
        transposed: the parameter is ``[G * i, o]`` instead of ``[G * o, i]``.
        origin: name of the op, for ``explain``; a rule leaves it empty.
    """

    c: Tensor
    a: Tensor
    shape: tuple[int, ...]
    transposed: bool = False
    origin: str = field(default="", kw_only=True, compare=False)

    @property
    def rows(self) -> tuple[int, int]:
        return self.c.shape[0], self.c.shape[1]

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        """The factors of the parameter's first dimension and the others: ``[K or 1, B, T, G, features]``."""
        a = self.a.unsqueeze(0)
        return (a, self.c) if self.transposed else (self.c, a)

    @property
    def sides(self) -> tuple[int, int]:
        """Features of the two factors."""
        o, i = self.c.shape[-1], self.a.shape[-1]
        return (i, o) if self.transposed else (o, i)

    @property
    def grain(self) -> int:
        return self.sides[1]

    @property
    def kind(self) -> Hashable:
        """A key that is equal for blocks that can be joined."""
        return self.transposed, self.c.shape[3:], self.a.shape[2:], self.c.dtype, self.a.dtype

    def samples(self, start: int, stop: int) -> Outer:
        return replace(self, c=self.c[:, start:stop], a=self.a[start:stop])

    def objectives(self, which: Tensor) -> Outer:
        """The block of some of the objectives."""
        return replace(self, c=self.c[which])

    def positions(self, start: int, stop: int) -> Outer:
        """The block of some of the positions."""
        return replace(self, c=self.c[:, :, start:stop], a=self.a[:, start:stop])

    @staticmethod
    def join(blocks: Sequence[Outer]) -> Outer:
        """The sum of several blocks of one kind."""
        c, a = torch.cat([block.c for block in blocks], 2), torch.cat([block.a for block in blocks], 1)
        return replace(blocks[0], c=c, a=a)

    @property
    def lines(self) -> int:
        """Positions that ``positions`` can tell apart."""
        return self.c.shape[2]

    def workspace(self, dtype: torch.dtype) -> int:
        """Elements that ``part`` needs for each sample besides its result."""
        (K, _, T, G, o), i = self.c.shape, self.a.shape[-1]
        copied = not self._is_bmm or self.c.dtype != dtype or self.a.dtype != dtype
        return T * G * (K * o + i) if copied else 0

    def part(self, start: int, stop: int, dtype: torch.dtype | None = None) -> Tensor:
        """The entries from ``start`` to ``stop`` of all rows, ``[B, K, stop - start]``."""
        if self._is_bmm:
            return self._part_by_bmm(start // self.grain, stop // self.grain, dtype or self.c.dtype)
        left, right = (shared(x, 1) for x in self.factors)
        per, grain = left.shape[-1], right.shape[-1]
        first, last = start // grain // per, (stop // grain - 1) // per
        begin, end = start // grain - first * per, stop // grain - last * per
        if last > first and (begin > 0 or end < per):  # whole groups apart from pieces of one
            cut = (first + 1 if begin > 0 else last) * per * grain
            return torch.cat([self.part(start, cut, dtype), self.part(cut, stop, dtype)], -1)
        left = left[..., first : last + 1, begin:end].to(dtype or self.c.dtype)
        right = right[..., first : last + 1, :].to(left.dtype)
        rows = torch.einsum("kbtgp,lbtgq->bklgpq", left, right)  # one of k and l is 1
        return rows.reshape(self.rows[1], self.rows[0], -1)

    @property
    def _is_bmm(self) -> bool:
        """Whether one batched product makes the rows, with a matrix of each factor for each row."""
        return self.c.shape[3] == 1 and 1 in self.c.shape[:2]

    def _part_by_bmm(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """A part of the rows for some features of the left factor, ``[B, K, entries]``."""
        c, a = self.c.squeeze(3).flatten(0, 1).to(dtype), self.a.squeeze(2).to(dtype)
        if len(a) < len(c):  # all objectives of the one sample share its activations
            a = a.expand(len(c), -1, -1)
        left, right = (a, c) if self.transposed else (c, a)
        if stop - start < left.shape[2]:
            left = left[:, :, start:stop]
        rows = host_memory.bmm(left.mT, right).flatten(1)
        return rows.unsqueeze(1 if self.c.shape[0] == 1 else 0)

    def dense(self) -> Tensor:
        """All rows, ``[K, B, *shape]``."""
        entries = self.c.shape[3] * self.c.shape[4] * self.a.shape[3]
        if not entries:
            return self.c.new_zeros(*self.rows, *self.shape)
        return self.part(0, entries).transpose(0, 1).reshape(*self.rows, *self.shape)

    def vjp(self, w: Tensor) -> Tensor:
        """``Jᵀ w`` for ``w [K, B]``: an ordinary weight-gradient product."""
        left, right = weighted(self.c, w, self.a)
        if self.transposed:  # the product in the parameter's own order: its transpose would be copied
            left, right = right, left
        if self.c.shape[3] == 1:
            return left.flatten(0, 2).t().mm(right.flatten(0, 2)).reshape(self.shape)
        left, right = (x.flatten(0, 1).transpose(0, 1) for x in (left, right))
        return (left.mT @ right).reshape(self.shape)  # [G, o, i]

    def sketch(self, w: Tensor, y: Tensor) -> Tensor:
        """``Jᵀ w`` as a matrix of ``grain`` columns times ``y [grain, n]``, without forming it."""
        c, a = weighted(self.c, w, self.a)
        left, right = (a, c) if self.transposed else (c, a)
        right = right.flatten(0, 1).transpose(0, 1) @ y  # [G, BT, n]
        return (left.flatten(0, 1).permute(1, 2, 0) @ right).flatten(0, 1)

    def bound(self, w: Tensor) -> Tensor:
        """An upper bound of the norm of ``Jᵀ w`` that no cancellation lowers: the scale of rounding."""
        c = self.c.square().sum((-1, -2)).sqrt() * w.abs()[:, :, None]
        return (c.sum(0) * self.a.square().sum((-1, -2)).sqrt()).sum()


def shared(x: Tensor, dim: int) -> Tensor:
    """One entry along ``dim`` where all are the same memory (expanded), else ``x`` itself."""
    return x.narrow(dim, 0, 1) if x.shape[dim] > 1 and x.stride(dim) == 0 else x


def weighted(c: Tensor, w: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """``c [B, ...]`` and ``a [B, ...]`` the products of which are summed with weights ``w [K, B]``.

    They have one sample where all share ``a``.
    """
    a = shared(a, 0)
    if a.shape[0] < c.shape[1]:
        return torch.einsum("kb,kb...->...", w, c).unsqueeze(0), a
    if len(c) > 1:
        return torch.einsum("kb,kb...->b...", w, c), a
    if a.numel() < c.numel():  # the smaller of the two is copied
        return c[0], a * w[0].view(-1, *[1] * (a.ndim - 1))
    return c[0] * w[0].view(-1, *[1] * (c.ndim - 2)), a
