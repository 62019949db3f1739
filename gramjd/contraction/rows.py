"""Plans that build rows, some entries of the parameter at a time, and multiply them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain
from math import prod
from typing import Any

import torch
from torch import Tensor

from gramjd import host_memory
from gramjd.blocks import Block, Conv, Dense, Lookup, Outer, common_grain, transpose
from gramjd.contraction.cost import Cost, half
from gramjd.contraction.options import Limits
from gramjd.contraction.pairwise import Sizes
from gramjd.contraction.tiles import added, canonical, over_samples, product, ranges
from gramjd.internals import is_ours

CACHED = 2**21  # elements of the rows that are built at once


def rows_cost(u: Block, v: Block) -> Cost:
    """``n T·o·i`` to build the rows, ``n²·o·i`` to multiply them."""
    (K1, B1), (K2, B2), P, same = u.rows, v.rows, prod(u.shape), u is v
    blocks: tuple[Block, ...] = (u,) if same else (u, v)
    built = sum(building_cost(block)[0] for block in blocks)
    moved = sum(building_cost(block)[1] for block in blocks)
    n1, n2 = K1 * B1, K2 * B2
    slabs = 1 + sum(block.rows[0] * block.rows[1] for block in blocks) * P // CACHED
    products = half(same, n1 * n2 * P, n1)
    calls = 8 + sum(6 for block in blocks if isinstance(block, Lookup))
    return Cost(built + products, moved, calls * slabs, (n1 + (0 if same else n2)) * P)


def building_cost(block: Block) -> tuple[int, int]:
    """Multiply-adds and elements moved to build all rows of a block."""
    (K, B), P = block.rows, prod(block.shape)
    if isinstance(block, Dense):
        return 0, K * B * P if K > 1 else 0  # rows go by samples first
    if isinstance(block, Lookup):
        return 0, 2 * K * B * P + block.c.numel()
    sizes = Sizes.of(block)
    unfolded = sizes.rights * sizes.T * sizes.G * sizes.q if isinstance(block, Conv) else 0
    return K * B * sizes.T * P, K * B * P + unfolded


def rows(u: Block, v: Block, limits: Limits) -> Tensor:
    """Rows of both blocks for some entries of the parameter at a time, multiplied and added up."""
    u, v = _narrow_first(u, v, limits)
    P, grain = prod(u.shape), common_grain(u, v)
    n = u.rows[0] * u.rows[1] + (0 if u is v else v.rows[0] * v.rows[1])
    step = limits.cached(CACHED) // max(1, n * grain)
    most = max(u.rows[1], v.rows[1])
    if step < 1 and n * grain > limits.elements and most > 1:
        fewer = max(1, most * limits.elements // (2 * n * grain))
        return over_samples(u, v, min(fewer, -(-most // 2)), lambda x, y: rows(x, y, limits))

    def build(block: Block, start: int, stop: int) -> Tensor:
        workspace = block.workspace(limits.dtype)
        return matrix(block, limits, workspace, lambda b: b.part(start * grain, stop * grain, limits.dtype))

    def slab(start: int, stop: int) -> Tensor:
        left = build(u, start, stop)
        return product(left, left if u is v else build(v, start, stop))

    total = added(slab(*r) for r in ranges(P // grain, step))
    return canonical(total, u.rows, v.rows)


def _narrow_first(u: Block, v: Block, limits: Limits) -> tuple[Block, Block]:
    """Reorder the entries of the rows, so that the product that builds them is faster."""
    if not (isinstance(u, Outer) and isinstance(v, Outer)) or u.transposed != v.transposed:
        return u, v
    if u.sides != v.sides:  # as matrices of other sizes, they would be reordered in other ways
        return u, v
    if any(block.c.shape[3] > 1 or block.sides[0] <= block.grain for block in (u, v)):
        return u, v
    n = u.rows[0] * u.rows[1] + (0 if u is v else v.rows[0] * v.rows[1])
    if n * u.sides[0] > limits.cached(CACHED):
        return u, v
    turned = transpose(u)
    return turned, turned if u is v else transpose(v)


def dense_rows(u: Dense, v: Dense, limits: Limits) -> Tensor:
    """Rows that are there, converted some entries at a time where they must be."""
    left = u.matrix()
    right = left if u is v else v.matrix()
    copied = {left.dtype, right.dtype} != {limits.dtype}
    step = limits.elements // (len(left) + len(right)) if copied else left.shape[1]

    def slab(start: int, stop: int) -> Tensor:
        whole = stop - start == left.shape[1]
        some = (left if whole else left[:, start:stop]).to(limits.dtype)
        if u is v:
            return product(some, some)
        return product(some, (right if whole else right[:, start:stop]).to(limits.dtype))

    total = added(slab(*r) for r in ranges(left.shape[1], step))
    return total.view(*u.rows, *v.rows)


def matrix(block: Any, limits: Limits, workspace: int, build: Callable[[Any], Tensor]) -> Tensor:
    """``[B K, entries]`` from ``build``, which makes ``[b, K, entries]`` for some of the samples.

    ``build`` needs ``workspace`` elements for each sample besides its result.
    """
    step = limits.elements // max(1, workspace)
    if step >= block.rows[1]:
        return build(block).flatten(0, 1)
    if step < 1 and isinstance(block, (Outer, Conv)) and block.lines > 1:
        pieces = ranges(block.lines, block.lines * limits.elements // workspace)
        needs = [(r, workspace * (r[1] - r[0]) // block.lines) for r in pieces]
        return added(matrix(block.positions(*r), limits, need, build) for r, need in needs)
    parts = (build(block.samples(*r)) for r in ranges(block.rows[1], step))
    return together(parts, block.rows[1]).flatten(0, 1)


def together(parts: Iterator[Tensor], count: int) -> Tensor:
    """``torch.cat(parts)``, of ``count`` entries, which holds no part until all are there if it need not."""
    first = next(parts)
    if len(first) == count:
        return first
    if not is_ours(first):
        return torch.cat([first, *parts])
    found, start = host_memory.empty((count, *first.shape[1:]), first), 0
    for part in chain([first], parts):
        found[start : start + len(part)] = part
        start += len(part)
    return found
