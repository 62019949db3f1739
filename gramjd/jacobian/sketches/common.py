"""What all kinds of sketches ask of blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from gramjd.blocks import Block, Conv, Lookup, Outer

COPIES = 3  # of rows, that making them may take
Live = Sequence[tuple[int, Block]]  # blocks, and of which part they are
Shares = Iterator[tuple[int, Tensor]]  # [K, B, dim], to be added to that of this part
Sides = tuple[int, int]  # of a parameter as a matrix: its first dimension, and all others


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
