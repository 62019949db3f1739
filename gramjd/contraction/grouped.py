"""Contracts several parameters together.

A weight and a bias whose rows are made of the same cotangents; and all parameters of short rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor

from gramjd.blocks import Block, Dense, Outer
from gramjd.contraction.options import Options, limits
from gramjd.contraction.tiles import added, product
from gramjd.internals import is_dynamo_tracing, is_plain

SHORT = 2**16  # elements of all rows of a parameter, below which a call takes longer than a copy of them
MANY = 2**20  # elements that are copied for one product


def biased(each: Sequence[Sequence[Block]]) -> dict[int, int]:
    """Positions of weights, and of the biases of the same calls at one position a sample."""
    if is_dynamo_tracing():
        return {}
    biases: dict[object, int] = {}
    for n, blocks in enumerate(each):
        if len(blocks) == 1 and isinstance(blocks[0], Dense) and (key := _memory(blocks[0].values)):
            biases.setdefault((key, blocks[0].rows), n)
    found = {}
    for n, blocks in enumerate(each):
        if len(blocks) == 1 and isinstance(blocks[0], Outer) and (key := _memory(blocks[0].c)):
            bias = biases.pop((key, blocks[0].rows), None)
            if bias is not None:
                found[n] = bias
    return found


def _memory(c: Tensor) -> tuple[object, ...] | None:
    """A key that is equal for tensors with the same entries in the same order; ``None`` if unknown."""
    if not is_plain(c):
        return None
    layout = [(size, step) for size, step in zip(c.shape, c.stride(), strict=True) if size > 1]
    return c.data_ptr(), c.dtype, c.device, *layout


def is_short(blocks: Sequence[Block]) -> bool:
    """Whether a parameter has one block of short rows that exist already."""
    return len(blocks) == 1 and isinstance(blocks[0], Dense) and blocks[0].values.numel() <= SHORT


def short_rows(blocks: Sequence[Block], options: Options) -> Tensor:
    """The sum of the Gramians ``[K, B, K, B]`` of such blocks, by as few products as memory allows."""
    found = [block for block in blocks if isinstance(block, Dense)]
    most = limits(options, found[0].values, *[block.values.dtype for block in found])
    size, start, numbers = min(MANY, most.elements // 2), 0, []
    for block in found:
        start += block.values.numel()
        numbers.append(start // max(1, size))
    devices = [block.values.device for block in found]
    groups = groupby(zip(numbers, devices, found, strict=True), key=lambda each: each[:2])
    matrices = ([block.matrix().to(most.dtype) for *_, block in group] for _, group in groups)
    joined = (torch.cat(each, 1) if len(each) > 1 else each[0] for each in matrices)
    return added(product(rows, rows) for rows in joined).view(*found[0].rows, *found[0].rows)
