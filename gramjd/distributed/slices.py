"""Shares of a Gramian from rows that are cut into slices of columns, one for each rank.

Of each parameter, every rank gets the rows of all ranks at some of its entries, and multiplies them. What
the slices give is added up. Rows are built and sent a few entries at a time, in messages that are no larger
than the budget of memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from gramjd.contraction.options import Limits
from gramjd.contraction.products import Part
from gramjd.contraction.rows import matrix
from gramjd.contraction.tiles import product, ranges
from gramjd.distributed.ranks import Ranks
from gramjd.distributed.ring import Own
from gramjd.rounding import own_precision


@dataclass(frozen=True)
class Rows:
    """The rows of one parameter as they are spread over the ranks."""

    entries: int  # P
    grain: int  # of which columns come in multiples
    rows: tuple[int, ...]  # of each rank, K·B; 0 where it does not use the parameter


@dataclass(frozen=True)
class Piece:
    """Some entries of a parameter, cut into slices."""

    parameter: int
    rows: tuple[int, ...]  # of each rank
    bounds: tuple[int, ...]  # of the slices

    @property
    def start(self) -> int:
        return self.bounds[0]

    def width(self, rank: int) -> int:
        """Columns of a rank's slice."""
        return self.bounds[rank + 1] - self.bounds[rank]

    def away(self, rank: int) -> int:
        """Elements that a rank sends to others."""
        return self.rows[rank] * (self.bounds[-1] - self.bounds[0] - self.width(rank))


Message = tuple[Piece, ...]


def messages(parameters: Mapping[int, Rows], n: int, elements: int) -> list[Message]:
    """Pieces of all parameters, together in messages for which no rank needs more than these elements."""
    found: list[list[Piece]] = []
    room = 0
    for p, rows in parameters.items():
        units, most = rows.entries // rows.grain, max(max(rows.rows), -(-sum(rows.rows) // n))
        for start, stop in ranges(units, max(1, elements // max(1, most * rows.grain))):
            needed = most * rows.grain * (stop - start)
            if not found or needed > room:
                found.append([])
                room = elements
            cuts = [start + (stop - start) * r // n for r in range(n + 1)]
            found[-1].append(Piece(p, rows.rows, tuple(rows.grain * cut for cut in cuts)))
            room -= needed
    return [tuple(message) for message in found]


@own_precision
def share(ranks: Ranks, sent: Sequence[Message], own: Own, sizes: Sequence[int], summed: bool) -> Tensor:
    """This rank's share of the Gramian of all rows, exactly symmetric: ``[ΣB K, ΣB K]``.

    Where rows are ``summed`` over ranks, ``[K, K]``. Rows go by samples first.
    """
    K = own.objectives
    n = K if summed else K * sum(sizes)
    total = torch.zeros(n, n, dtype=own.dtype, device=own.like.device)
    for message in sent:
        columns = _Exchange(ranks, message, own, sizes).columns()
        rows = _added(columns) if summed else torch.cat(list(columns))
        total += product(rows, rows)
    return total.add(total.T).div_(2)  # the product alone is symmetric but for rounding


def add_up(ranks: Ranks, mine: Tensor, own: Own, sizes: Sequence[int]) -> Tensor:
    """This rank's rows ``[K, B, K, ΣB]`` of the sum of all ranks' shares, added in order of ranks."""
    K, n = own.objectives, sum(sizes)
    strips = [strip.flatten() for strip in mine.split([K * size for size in sizes])]
    given = ranks.exchange(strips, [K * sizes[ranks.rank] * K * n] * ranks.size)
    return _added(given).view(sizes[ranks.rank], K, n, K).permute(1, 0, 3, 2)


def _added(terms: Sequence[Tensor]) -> Tensor:
    """Add up terms in order, for the same rounding on every rank and in every run."""
    total = terms[0].clone()
    for term in terms[1:]:
        total += term
    return total


@dataclass(frozen=True)
class _Exchange:
    """One message to every rank, and one from each."""

    ranks: Ranks
    message: Message
    own: Own
    sizes: Sequence[int]  # samples of each rank

    @cached_property
    def limits(self) -> Limits:
        return self.own.limits

    def columns(self) -> list[Tensor]:
        """The rows ``[B K, width]`` of each rank at this rank's slices of all pieces."""
        r, n = self.ranks.rank, self.ranks.size
        built = [self._built(piece) if piece.rows[r] else None for piece in self.message]
        sent = [
            torch.cat(
                [
                    rows[:, piece.bounds[q] - piece.start : piece.bounds[q + 1] - piece.start].flatten()
                    for piece, rows in zip(self.message, built, strict=True)
                    if rows is not None
                ]
                or [self._zeros(0)]
            )
            for q in range(n)
        ]
        lengths = [sum(piece.rows[s] * piece.width(r) for piece in self.message) for s in range(n)]
        return [self._unpacked(flat, s) for s, flat in enumerate(self.ranks.exchange(sent, lengths))]

    def _unpacked(self, flat: Tensor, source: int) -> Tensor:
        """The rows that one rank sent; zeros for parameters that it does not use."""
        found, start = [], 0
        height = self.own.objectives * self.sizes[source]
        for piece in self.message:
            width = piece.width(self.ranks.rank)
            if not piece.rows[source]:
                found.append(self._zeros(height, width))
                continue
            found.append(flat[start : start + height * width].view(height, width))
            start += height * width
        return torch.cat(found, 1)

    def _built(self, piece: Piece) -> Tensor:
        """This rank's rows at the entries of a piece, ``[B K, entries]``."""
        return torch.cat([self._of(part, piece) for part in self.own.parts])

    def _of(self, part: Part, piece: Piece) -> Tensor:
        start, stop, limits = piece.bounds[0], piece.bounds[-1], self.limits
        total = self._zeros(self.own.objectives * part.samples, stop - start)
        for block in part.live(piece.parameter) if part.samples else ():
            workspace = block.workspace(limits.dtype)
            total += matrix(block, limits, workspace, lambda b: b.part(start, stop, limits.dtype))
        return total

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=self.own.dtype, device=self.own.like.device)
