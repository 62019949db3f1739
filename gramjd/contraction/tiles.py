"""Tiling: ranges, symmetric halves, and products of matrices of rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from gramjd.internals import is_ours

HALVES = 4  # tiles along each side of a symmetric product
LEAF = 512  # rows of a tile below which halving a symmetric product no longer pays
STRETCHES = 8  # of the entries of few and long rows, multiplied side by side


def ranges(total: int, step: int) -> list[tuple[int, int]]:
    """``total`` in pieces of about the same size, none larger than ``step``."""
    count = max(1, -(-total // max(1, step)))
    return [(total * i // count, total * (i + 1) // count) for i in range(count)]


def root(count: int) -> int:
    """The integer square root of a count, which may be a symbol of a compiler's."""
    return int(count**0.5)


def over_samples(u: Any, v: Any, step: int, kernel: Callable[[Any, Any], Tensor]) -> Tensor:
    """``[K, B, K, B]`` from tiles of at most ``step`` samples; half of them, if ``u is v``."""
    left = [u.samples(*r) for r in ranges(u.rows[1], step)]
    if u is not v:
        right = [v.samples(*r) for r in ranges(v.rows[1], step)]
        return _cat([[kernel(x, y) for y in right] for x in left])
    tiles: list[list[Tensor]] = []
    for i, x in enumerate(left):
        found = [tiles[j][i].permute(2, 3, 0, 1) for j in range(i)]
        tiles.append(found + [kernel(x, y) for y in left[i:]])
    return _cat(tiles)


def over_positions(x: Any, y: Any, side: int, kernel: Callable[[Any, Any], Tensor]) -> Tensor:
    """The sum over tiles of at most ``side`` positions of each block."""
    first, second = (ranges(block.c.shape[2], side) for block in (x, y))
    return added(kernel(x.positions(*r), y.positions(*s)) for r in first for s in second)


def added(terms: Iterable[Tensor]) -> Tensor:
    """The sum of at least one tensor, of which no more than two exist at a time, where the first one is."""
    total = sum_of(terms)
    assert total is not None
    return total


def sum_of(terms: Iterable[Tensor]) -> Tensor | None:
    """The sum of some tensors, as of :func:`added`; ``None`` if there is none."""
    total = None
    for number, term in enumerate(terms):
        if total is None:
            total = term
            continue
        if term.device != total.device:  # of a parameter elsewhere
            term = term.to(total.device)
        if number > 1 and total.dtype == term.dtype and is_ours(total) and is_ours(term):
            total += term  # the sum of the first two is nobody else's
        else:
            total = total + term
        del term  # before the next one is made
    return total


def _cat(tiles: list[list[Tensor]]) -> Tensor:
    """Tiles ``[K, b, K, b']`` put together."""
    first = tiles[0][0]
    if is_ours(first) and (tiles[1:] or tiles[0][1:]):
        sizes, others = [row[0].shape[1] for row in tiles], [tile.shape[3] for tile in tiles[0]]
        found = first.new_empty(len(first), sum(sizes), first.shape[2], sum(others))
        for strip, row in zip(found.split(sizes, 1), tiles, strict=True):
            for place, tile in zip(strip.split(others, 3), row, strict=True):
                place.copy_(tile)
        return found
    strips = [torch.cat(row, 3) if len(row) > 1 else row[0] for row in tiles]
    return torch.cat(strips, 1) if len(strips) > 1 else strips[0]


def product(left: Tensor, right: Tensor) -> Tensor:
    """``left @ rightᵀ`` of matrices of rows; half of it, if ``left is right`` and that pays.

    Symmetric but for rounding: sums of such products are made exactly symmetric once, at their end.
    """
    if left is not right:
        return _inner(left, right)
    n = left.shape[0]
    count = min(HALVES, n // LEAF)
    if count < 2 or not is_ours(left):
        return _inner(left, left)
    found = left.new_empty(n, n)
    for start, stop in ranges(n, -(-n // count)):
        strip = found[start:stop, start:]
        torch.mm(left[start:stop], left[start:].mT, out=strip)
        found[stop:, start:stop] = strip[:, stop - start :].mT
    return found


def _inner(left: Tensor, right: Tensor) -> Tensor:
    """``left @ rightᵀ``; threads share out the result of one product, but not its sums over entries."""
    entries = left.shape[1]
    rows, columns = left.shape[0], right.shape[0]  # what len() says takes a call of a Python function
    long = entries * max(rows, columns) >= 2**18 and entries >= 128 * STRETCHES
    if not long or rows * columns > 2**14 or entries % STRETCHES:
        return left.mm(right.t())
    stretched = left.view(rows, STRETCHES, -1).transpose(0, 1)
    other = stretched if left is right else right.view(columns, STRETCHES, -1).transpose(0, 1)
    return stretched.bmm(other.mT).sum(0)


def canonical(square: Tensor, rows1: tuple[int, int], rows2: tuple[int, int]) -> Tensor:
    """Reorder ``[B₁ K₁, B₂ K₂]`` to ``[K₁, B₁, K₂, B₂]``."""
    (K1, B1), (K2, B2) = rows1, rows2
    return square.view(B1, K1, B2, K2).permute(1, 0, 3, 2)
