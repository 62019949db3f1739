"""Plans of tables that are looked up; none builds a row as long as the table unless that is short."""

from __future__ import annotations

import torch
from torch import Tensor

from gramjd.blocks import Dense, Lookup, Outer
from gramjd.blocks.lookup import scattered
from gramjd.blocks.outer import shared
from gramjd.contraction.cost import Cost, half
from gramjd.contraction.options import Limits
from gramjd.contraction.tiles import added, canonical, over_positions, over_samples, product, ranges, root

CACHED = 2**20  # elements of a tile
SLAB = 2**21  # elements of the rows over distinct entries that are built at once,
FEATURES = 16  # though no fewer features of them than these


def pairwise_cost(u: Lookup, v: Lookup) -> Cost | None:
    """The cost of :func:`pairwise`: ``(n T)²·d`` multiply-adds."""
    if u.grain != v.grain:  # tables of other sizes
        return None
    (K1, B1, T1, d), (K2, B2, T2) = u.c.shape, v.c.shape[:3]
    pairs = half(u is v, K1 * B1 * T1 * K2 * B2 * T2, K1 * B1 * T1)
    return Cost(pairs * (d + 1), 5 * pairs, 8 * (1 + 2 * pairs // CACHED), 3 * pairs)


def pairwise(u: Lookup, v: Lookup, limits: Limits) -> Tensor:
    """Compare all pairs of positions: ``Σ_{t,s} [id_t = id_s] (c_t · c_s)``."""
    (K1, _, T1), (K2, _, T2) = u.c.shape[:3], v.c.shape[:3]
    side = root(limits.cached(CACHED) // (3 * K1 * K2))

    def tile(x: Lookup, y: Lookup) -> Tensor:
        return _pairs(x, y, limits.dtype)

    return over_samples(u, v, side // max(T1, T2), lambda x, y: over_positions(x, y, side, tile))


def _pairs(x: Lookup, y: Lookup, dtype: torch.dtype) -> Tensor:
    same = x.ids[:, :, None, None, None] == y.ids  # [b, T₁, 1, b', T₂]
    left, right = (z.c.to(dtype).flatten(0, 2) for z in (x, y))
    both = (left @ right.mT).view(*x.c.shape[:3], *y.c.shape[:3]) * same
    return both.sum(5).sum(2)


def distinct_cost(u: Lookup, v: Lookup) -> Cost | None:
    """``n²·D·d`` for ``D`` entries that were looked up at all."""
    if u.grain != v.grain:
        return None
    (K1, B1, T1, d), (K2, B2, T2) = u.c.shape, v.c.shape[:3]
    D, n1, n2 = _entries(u, v), K1 * B1, K2 * B2
    built = n1 if u is v else n1 + n2
    found = B1 * T1 + (0 if u is v else B2 * T2)
    products = half(u is v, n1 * n2 * D * d, n1)
    return Cost(products, 3 * built * D * d // 2 + 10 * found, 30, built * D * d)


def distinct(u: Lookup, v: Lookup, limits: Limits) -> Tensor:
    """Rows over the entries that were looked up, some features at a time."""
    D, (K1, B1), (K2, B2) = _entries(u, v), u.rows, v.rows
    most = limits.elements // ((1 if u is v else 2) * D)  # rows times features
    if most < max(K1 * B1, K2 * B2):
        step = max(1, most // (2 * max(K1, K2)))
        if step < max(B1, B2):
            return over_samples(u, v, step, lambda x, y: distinct(x, y, limits))
    left, right = _ranks(u, v, D)

    def slab(start: int, stop: int) -> Tensor:
        rows = _rows(u, left, D, start, stop, limits.dtype)
        return product(rows, rows if u is v else _rows(v, right, D, start, stop, limits.dtype))

    n = max(K1 * B1, K2 * B2)
    step = min(most // n, max(FEATURES, SLAB // (n * D)))
    total = added(slab(*r) for r in ranges(u.grain, step))
    return canonical(total, u.rows, v.rows)


def _rows(block: Lookup, ids: Tensor, size: int, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    return scattered(block.c[..., start:stop].to(dtype), ids, size).flatten(2).flatten(0, 1)


def _entries(u: Lookup, v: Lookup) -> int:
    """An upper bound of the number of entries that two blocks look up."""
    found = shared(u.ids, 0).numel() + (0 if u is v else shared(v.ids, 0).numel())
    return min(u.entries, found)


def _ranks(u: Lookup, v: Lookup, entries: int) -> tuple[Tensor, Tensor]:
    """Ids counted among those that occur; as they are, where the table is short."""
    if entries == u.entries:
        return u.ids, v.ids
    blocks = (u,) if u is v else (u, v)
    compact = [shared(block.ids, 0) for block in blocks]
    ordered, order = torch.cat([ids.flatten() for ids in compact]).sort()
    steps = torch.cat([torch.zeros_like(ordered[:1]), (ordered[1:] != ordered[:-1]).to(ordered.dtype)])
    ranks = torch.zeros_like(ordered).scatter(0, order, steps.cumsum(0))
    pieces = ranks.split([ids.numel() for ids in compact])
    found = [r.view(i.shape).expand(b.ids.shape) for r, i, b in zip(pieces, compact, blocks, strict=True)]
    return found[0], found[-1]


def picked_cost(u: Lookup, v: Outer) -> Cost | None:
    """The cost of :func:`picked`: at most ``n₁ T₁ · n₂ T₂ · d`` multiply-adds."""
    if v.c.shape[3] > 1 or v.sides != (u.entries, u.grain):
        return None
    (K1, B1, T1, d), (K2, B2, T2) = u.c.shape, v.c.shape[:3]
    pairs, K = B1 * T1 * B2 * T2, K1 * K2 if v.transposed else K1
    return Cost(pairs * (K * d + K1 * K2), pairs * (K + 3 * K2), 8, pairs * (K + 2 * K2 + K1 * K2))


def picked(u: Lookup, v: Outer, limits: Limits) -> Tensor:
    """``Σ_{t,s} left_s[id_t] (c_t · right_s)``: a weight looked up here and multiplied by there."""
    (K1, _, T1), (K2, _, T2) = u.c.shape[:3], v.c.shape[:3]
    side = root(limits.cached(CACHED) // (3 * K1 * K2 + K1 + K2))

    def tile(x: Lookup, y: Outer) -> Tensor:
        return _picked(x, y, limits.dtype)

    return over_samples(u, v, side // max(T1, T2), lambda x, y: over_positions(x, y, side, tile))


def _picked(x: Lookup, y: Outer, dtype: torch.dtype) -> Tensor:
    left, right = (z[:, :, :, 0] for z in y.factors)  # [K₂ or 1, B₂, T₂, V], [K₂ or 1, B₂, T₂, d]
    ids = x.ids.flatten().expand(*left.shape[:3], -1)  # gather is three times as fast as indexing
    entries = left.gather(-1, ids).unflatten(-1, x.ids.shape).to(dtype)  # [K₂ or 1, B₂, T₂, b, T₁]
    c, flat = x.c.to(dtype).flatten(0, 2), right.to(dtype).flatten(0, 2)
    inner = (flat @ c.mT).view(*right.shape[:3], *x.c.shape[:3])  # [K₂ or 1, B₂, T₂, K₁, b, T₁]
    both = inner * entries.unsqueeze(3)
    return both.sum(5).sum(2).permute(2, 3, 0, 1)


def gathered_cost(u: Lookup, v: Dense) -> Cost:
    """The cost of :func:`gathered`: ``n₁ T₁ · n₂ · d`` multiply-adds."""
    (K1, B1, T1, d), n2 = u.c.shape, v.rows[0] * v.rows[1]
    return Cost(K1 * B1 * T1 * n2 * d, 2 * B1 * T1 * n2 * d, 3 * B1, T1 * n2 * d)


def gathered(u: Lookup, v: Dense, limits: Limits) -> Tensor:
    """Each sample's cotangents against the dense rows at its ids."""
    (K1, B1, T1, d), (K2, B2) = u.c.shape, v.rows
    table = v.values.reshape(K2 * B2, u.entries, d)

    def piece(sample: int, start: int, stop: int) -> Tensor:
        rows = table[:, u.ids[sample, start:stop]].to(limits.dtype).flatten(1)  # [K₂ B₂, t d]
        return u.c[:, sample, start:stop].to(limits.dtype).flatten(1) @ rows.mT

    pieces = ranges(T1, limits.cached(CACHED) // (K2 * B2 * d))
    found = [added(piece(sample, *r) for r in pieces) for sample in range(B1)]
    return torch.stack(found, 1).view(K1, B1, K2, B2)
