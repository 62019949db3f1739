"""Rows that a Gramian builds anyway, kept for the product ``Jᵀ w`` that follows it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import prod

from torch import Tensor

from gramjd.blocks import Block, Conv, Dense, Lookup, Outer
from gramjd.contraction.choice import plans
from gramjd.contraction.conv import METHODS
from gramjd.contraction.cost import ascending
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
        options: of the contraction, with the memory for rows.
        known: rows that there are already, also of other parameters.
    """
    taken = sum(rows.nbytes for n, rows in known.items() if n not in each)
    found = {n: mine for n, mine in each.items() if _builds_rows(mine)}
    for n, blocks in ascending(found.items(), lambda item: -max(map(positions, item[1]))):
        factors = [x for block in blocks for x in _factors(block)]
        most = limits(options, factors[0], *[x.dtype for x in factors])
        count, entries = prod(blocks[0].rows), prod(blocks[0].shape)
        size = count * (entries + 3 * count)  # with room for products of these rows
        room = options.kept_budget(factors[0].device) // most.dtype.itemsize
        if {x.dtype for x in factors} == {most.dtype} and size + taken // most.dtype.itemsize <= room:
            rows = known.get(n)
            if rows is None:
                rows = _rows(blocks, Limits(max(1, most.elements // 4), most.dtype))
            taken += rows.nbytes
            yield n, rows


def of_rows(rows: Tensor, K: int) -> Tensor:
    """The Gramian ``[K, B, K, B]`` of rows ``[B K, P]``."""
    sizes = K, len(rows) // K
    return canonical(product(rows, rows), sizes, sizes)


def positions(block: Block) -> int:
    """The number of positions ``T``."""
    if isinstance(block, Conv):
        return block.T
    return 0 if isinstance(block, Dense) else block.c.shape[2]


def _factors(block: Block) -> Sequence[Tensor]:
    """The factors that a plan multiplies."""
    if isinstance(block, Dense):
        return (block.values,)
    if isinstance(block, Conv):
        return block.factors
    return (block.c, block.a) if isinstance(block, Outer) else (block.c,)


def _builds_rows(blocks: Sequence[Block]) -> bool:
    """Whether the plan of one of the blocks builds rows, and it has enough positions to keep them.

    Rows of other blocks, as of an embedding that is tied to the last layer, are added to these.
    """
    large = [b for b in blocks if isinstance(b, (Outer, Conv)) and positions(b) >= POSITIONS]
    if not large or (len(blocks) > 1 and any(isinstance(block, Conv) for block in blocks)):
        return False
    if not all(is_ours(x) for block in blocks for x in _factors(block)):
        return False
    return any(plans(block, block)[0][0].name in ("rows", *_METHODS) for block in large)


def _rows(blocks: Sequence[Block], few: Limits) -> Tensor:
    """The rows of the sum of some blocks, as their plans build them."""
    first, *others = sorted(blocks, key=lambda block: not isinstance(block, (Outer, Conv)))
    entries = prod(first.shape)
    if isinstance(first, Conv):
        return _METHODS[plans(first, first)[0][0].name].rows(first, few)

    def of_one(block: Block) -> Tensor:
        return matrix(block, few, block.workspace(few.dtype), lambda b: b.part(0, entries, few.dtype))

    rows = of_one(first).contiguous()  # groups come in another order
    for block in others:
        if isinstance(block, Lookup):
            block.add_to(rows)
        else:
            rows.add_(of_one(block))
    return rows
