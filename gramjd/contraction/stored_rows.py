"""Rows that a Gramian builds anyway, kept for the product ``Jᵀ w`` that follows it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import prod
from typing import TypeGuard

from torch import Tensor

from gramjd.blocks import Block, Conv, Outer
from gramjd.contraction.choice import plans
from gramjd.contraction.conv import METHODS
from gramjd.contraction.options import Limits, Options, limits
from gramjd.contraction.rows import matrix
from gramjd.contraction.tiles import canonical, product
from gramjd.internals import is_ours

# From so many on, the product that rows save takes longer than writing them to memory does.
POSITIONS = 64

_METHODS = {method.name: method for method in METHODS}


def kept_rows(each: Mapping[int, Sequence[Block]], options: Options, known: Mapping[int, Tensor]
              ) -> Iterator[tuple[int, Tensor]]:  # fmt: skip
    """Rows ``[B K, P]`` of some parameters, of those with the most positions first.

    Args:
        each: the blocks of each parameter.
        options: of the contraction; half of its memory is for rows.
        known: rows that there are already, also of other parameters.
    """
    taken = sum(rows.nbytes for n, rows in known.items() if n not in each)
    alone = {n: mine[0] for n, mine in each.items() if len(mine) == 1}
    found = {n: block for n, block in alone.items() if _builds_rows(block)}
    for n, block in sorted(found.items(), key=lambda item: -positions(item[1])):
        x, y = (block.c, block.a) if isinstance(block, Outer) else block.factors
        most = limits(options, x, x.dtype, y.dtype)
        count, entries = prod(block.rows), prod(block.shape)
        size = count * (entries + 3 * count)  # with room for products of these rows
        if x.dtype == y.dtype == most.dtype and size + taken // x.itemsize <= most.elements // 2:
            rows = known.get(n)
            if rows is None:
                rows = _rows(block, Limits(max(1, most.elements // 4), most.dtype))
            taken += rows.nbytes
            yield n, rows


def of_rows(rows: Tensor, K: int) -> Tensor:
    """The Gramian ``[K, B, K, B]`` of rows ``[B K, P]``."""
    sizes = K, len(rows) // K
    return canonical(product(rows, rows), sizes, sizes)


def positions(block: Outer | Conv) -> int:
    """``T``."""
    return block.T if isinstance(block, Conv) else block.lines


def _builds_rows(block: Block) -> TypeGuard[Outer | Conv]:
    """Whether the plan of a block builds rows, and the block has enough positions to keep them."""
    if not isinstance(block, (Outer, Conv)) or positions(block) < POSITIONS:
        return False
    if not all(map(is_ours, (block.c, block.a) if isinstance(block, Outer) else block.factors)):
        return False
    return plans(block, block)[0][0].name in ("rows", *_METHODS)


def _rows(block: Outer | Conv, few: Limits) -> Tensor:
    """All of them, as its plan builds them."""
    if isinstance(block, Conv):
        return _METHODS[plans(block, block)[0][0].name].rows(block, few)
    entries = prod(block.shape)
    return matrix(block, few, block.workspace(few.dtype), lambda b: b.part(0, entries, few.dtype))
