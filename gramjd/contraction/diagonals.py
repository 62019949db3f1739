"""The diagonal of a contraction: inner products of the same row of two blocks."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from gramjd.blocks import Block, Lookup, Outer, common_grain
from gramjd.contraction.cost import MOVE
from gramjd.contraction.options import Limits
from gramjd.contraction.pairwise import CACHED, Sizes
from gramjd.contraction.rows import building_cost
from gramjd.contraction.tiles import added, over_positions, ranges, root


def diagonal(u: Block, v: Block, limits: Limits) -> Tensor:
    """``[K, B]``, by the cheaper of two plans."""
    if isinstance(u, Lookup) and isinstance(v, Lookup) and u.grain == v.grain:
        return pairwise(u, v, limits)
    if isinstance(u, Outer) and isinstance(v, Outer) and _fewer_pairs(u, v):
        return pairwise(u, v, limits)
    return rows(u, v, limits)


def _fewer_pairs(u: Outer, v: Outer) -> bool:
    """Whether pairs of positions are cheaper than rows."""
    x, y = Sizes.of(u), Sizes.of(v)
    if (x.G, x.p, x.q) != (y.G, y.p, y.q):
        return False
    pairs = x.B * x.G * x.T * y.T * (x.K * max(x.p, x.q) + min(x.p, x.q) + MOVE * x.K)
    built = [building_cost(block) for block in ((u,) if u is v else (u, v))]
    return pairs <= sum(products + MOVE * moved for products, moved in built)


def rows(u: Block, v: Block, limits: Limits) -> Tensor:
    """Rows of both blocks for some entries of the parameter at a time."""
    (K, B), P, grain = u.rows, prod(u.shape), common_grain(u, v)
    need = max(block.workspace(limits.dtype) for block in (u, v))
    samples = max(1, limits.elements // (need + 3 * K * grain))
    if need:  # what a part copies, it copies for each slab again: whole rows of fewer samples
        samples = max(1, min(samples, limits.cached(CACHED) // (3 * K * P)))

    def some(start: int, stop: int) -> Tensor:
        x = u.samples(start, stop)
        y = x if u is v else v.samples(start, stop)
        step = limits.cached(CACHED) // (3 * K * (stop - start) * grain)
        return added(slab(x, y, *r) for r in ranges(P // grain, step))

    def slab(x: Block, y: Block, start: int, stop: int) -> Tensor:
        left = x.part(start * grain, stop * grain, limits.dtype)
        right = left if x is y else y.part(start * grain, stop * grain, limits.dtype)
        return (left * right).sum(2).mT

    return _cat([some(*r) for r in ranges(B, samples)])


def pairwise(u: Outer | Lookup, v: Outer | Lookup, limits: Limits) -> Tensor:
    """Inner products of all positions of the same row, of each factor by itself, multiplied."""
    (K, B, T1), T2, G = u.c.shape[:3], v.c.shape[2], u.c.shape[3] if isinstance(u, Outer) else 1
    pairs = limits.cached(CACHED) // (2 * K * G + G)
    side = root(pairs)

    def some(start: int, stop: int) -> Tensor:
        x = u.samples(start, stop)
        y = x if u is v else v.samples(start, stop)
        return over_positions(x, y, side, lambda x, y: _tile(x, y, limits.dtype))

    return _cat([some(*r) for r in ranges(B, pairs // (T1 * T2))])


def _tile(x: Outer | Lookup, y: Outer | Lookup, dtype: torch.dtype) -> Tensor:
    if isinstance(x, Lookup):
        assert isinstance(y, Lookup)
        inner = torch.einsum("kbtd,kbsd->kbts", x.c.to(dtype), y.c.to(dtype))
        return (inner * (x.ids[:, :, None] == y.ids[:, None])).sum((2, 3))
    assert isinstance(y, Outer)
    left, right = (
        torch.einsum("kbtgf,kbsgf->kbgts", p.to(dtype), q.to(dtype))
        for p, q in zip(x.factors, y.factors, strict=True)
    )
    return (left * right).sum((2, 3, 4))


def _cat(parts: list[Tensor]) -> Tensor:
    """``[K, b]`` of some samples each, put together."""
    return torch.cat(parts, 1) if len(parts) > 1 else parts[0]
