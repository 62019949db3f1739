"""What all kinds of sketches ask of blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from gramjd.blocks import Block, Conv, Lookup, Outer
from gramjd.contraction.options import Limits
from gramjd.jacobian.projection import Places, Projection

COPIES = 3  # of rows, that making them may take
Live = Sequence[tuple[int, Block]]  # blocks, and of which part they are
Sides = tuple[int, int]  # of a parameter as a matrix: its first dimension, and all others


@dataclass
class Sketches:
    """The sums of the sketches of some parts, and how they are made."""

    projection: Projection
    limits: Limits
    keep: bool  # parts of Ω, for later calls
    in_place: bool  # nothing transforms the sums
    totals: list[Tensor]  # [K, B, dim] of each part

    def add(self, n: int, share: Tensor, samples: tuple[int, int]) -> None:
        """Add a share ``[K, b, dim]`` of some samples of a part."""
        total, (begin, end) = self.totals[n], samples
        share = share.to(total.device)  # parameters may lie on several
        if self.in_place:
            total[:, begin:end].add_(share)
        else:
            self.totals[n] = total + F.pad(share, (0, 0, begin, total.shape[1] - end))

    def add_entries(self, n: int, rows: Tensor, places: Places, samples: tuple[int, int]) -> None:
        """Add each entry of ``rows [K, b, P]`` of some samples of a part to a column, with a sign."""
        columns, signs = places
        in_place = self.in_place and rows.device == self.totals[n].device
        if in_place and not isinstance(columns, Tensor):
            total = self.totals[n][:, slice(*samples)]
            for begin, end, column in columns:
                total[..., column : column + end - begin].addcmul_(rows[..., begin:end], signs[begin:end])
        else:
            self.add(n, by_columns(rows, places, self.projection.dim), samples)


def by_columns(rows: Tensor, places: Places, dim: int) -> Tensor:
    """``[*, dim]``: entries of ``rows [*, P]`` added up in the columns that each goes to."""
    columns, signs = places
    signed = rows * signs
    if isinstance(columns, Tensor):
        return summed_up(signed.new_zeros(*signed.shape[:-1], dim), columns, signed)
    shares = [
        F.pad(signed[..., begin:end], (column, dim - column - end + begin)) for begin, end, column in columns
    ]
    return torch.stack(shares).sum(0)


def summed_up(zeros: Tensor, columns: Tensor, values: Tensor) -> Tensor:
    """``values [*, P]`` added to the columns of ``zeros [*, dim]``, always in one order."""
    if zeros.device.type == "cpu":
        return zeros.index_add(zeros.ndim - 1, columns, values)
    first, rest = zeros.movedim(-1, 0), values.movedim(-1, 0)
    return first.index_put((columns,), rest, accumulate=True).movedim(0, -1)


def part_of(start: int, stop: int, dtype: torch.dtype) -> Callable[[Block], Tensor]:
    return lambda block: block.part(start, stop, dtype)


def factor_of(block: Block) -> Tensor:
    """One of the tensors that a block is made of."""
    if isinstance(block, (Outer, Conv)):
        return block.factors[0]
    return block.c if isinstance(block, Lookup) else block.values


def positions(block: Block) -> int:
    """Of one sample, those of several groups each."""
    if isinstance(block, Conv):
        return block.T * block.points.shape[3]
    if isinstance(block, Outer):
        return block.lines * block.c.shape[3]
    return block.ids.shape[1] if isinstance(block, Lookup) else 0
