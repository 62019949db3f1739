"""Pairwise plans: inner products of all positions, of each factor by itself, then multiplied."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gramjd.blocks import Conv, Outer
from gramjd.blocks.outer import shared
from gramjd.contraction.cost import Cost, half
from gramjd.contraction.options import Limits
from gramjd.contraction.tiles import HALVES, LEAF, over_positions, over_samples, product, root

CACHED = 2**20  # elements of a tile


@dataclass(frozen=True)
class Sizes:
    """The sizes of a block that is a sum of outer products, unfolded or not yet."""

    K: int
    B: int
    T: int
    G: int
    p: int  # features of the left factor
    q: int  # and of the right one
    lefts: int  # rows of the left factor that are not the same memory
    rights: int

    @staticmethod
    def of(block: Outer | Conv) -> Sizes:
        (K, B), x, y = block.rows, *block.factors
        lefts, rights = (len(z) * shared(z, 1).shape[1] for z in (x, y))
        if isinstance(block, Conv):
            return Sizes(K, B, block.T, x.shape[3], x.shape[4], block.grain, lefts, rights)
        return Sizes(K, B, x.shape[2], x.shape[3], x.shape[4], y.shape[4], lefts, rights)


def pairwise_cost(u: Outer | Conv, v: Outer | Conv) -> Cost | None:
    """The cost of :func:`pairwise` and :func:`unfolded_pairwise`."""
    x, y, same = Sizes.of(u), Sizes.of(v), u is v
    if (x.G, x.p, x.q) != (y.G, y.p, y.q):
        return None
    pairs, n = x.G * x.T * y.T, x.K * x.B * x.T
    left, right, both = x.lefts * y.lefts, x.rights * y.rights, x.K * x.B * y.K * y.B
    products = half(same, pairs * (left * x.p + right * x.q + both), n)
    entries = pairs * (left + right + both)
    moved = half(same, entries, n)
    if isinstance(u, Conv):  # unfolded once for each row of tiles
        moved += x.T * x.G * (x.lefts * x.p + x.rights * x.q) * (1 + moved // CACHED)
    calls = 10 if x.T * y.T == 1 else 13
    return Cost(products, moved, calls * (1 + moved // CACHED), entries)


def pairwise(u: Outer, v: Outer, limits: Limits) -> Tensor:
    """``Σ_{t,s} (left_t · left_s)(right_t · right_s)``; one of left and right is ``a``, the other ``c``."""
    K1, K2, G, T = u.rows[0], v.rows[0], u.c.shape[3], max(u.c.shape[2], v.c.shape[2])
    if T == G == 1 and _fits(u, v, limits):
        return _one_position(u, v, limits.dtype)
    pairs = G * (K1 * K2 + sum(len(x) * len(y) for x, y in zip(u.factors, v.factors, strict=True)))
    side = max(1, root(limits.cached(CACHED) // pairs))  # positions of a tile, along each side

    step = _step(u.rows, T, side, u is v)

    def tile(x: Outer, y: Outer) -> Tensor:
        return _tile(x, y, limits.dtype)

    return over_samples(u, v, step, lambda x, y: over_positions(x, y, side, tile))


def takes_bias(u: Outer, limits: Limits) -> bool:
    """Whether :func:`with_bias` works for this weight."""
    return u.c.shape[2] == u.c.shape[3] == 1 and _fits(u, u, limits)


def with_bias(u: Outer, dtype: torch.dtype) -> Tensor:
    """Share of a weight and of a bias that got the same cotangents, ``(a aᵀ + 1) ∘ (c cᵀ)``, at ``T = 1``."""
    return _one_position(u, u, dtype, bias=True)


def _fits(u: Outer, v: Outer, limits: Limits) -> bool:
    """Whether memory holds all pairs of rows at once."""
    return 3 * u.rows[0] * u.rows[1] * v.rows[0] * v.rows[1] <= limits.elements


def _one_position(u: Outer, v: Outer, dtype: torch.dtype, bias: bool = False) -> Tensor:
    """All rows at once, where the result is the largest tensor anyway."""
    found = []
    for x, y in zip(u.factors, v.factors, strict=True):
        x, y = (shared(z, 1).to(dtype)[:, :, 0, 0] for z in (x, y))
        left = x.flatten(0, 1)
        right = left if u is v else y.flatten(0, 1)
        found.append(product(left, right).view(*x.shape[:2], *y.shape[:2]))
    if bias:
        of_a = 0 if u.transposed else 1
        found[of_a] = found[of_a] + 1
    return (found[0] * found[1]).expand(*u.rows, *v.rows).contiguous()


def unfolded_pairwise(u: Conv, v: Conv, limits: Limits) -> Tensor:
    """Compute :func:`pairwise` for convolutions, which it unfolds tile by tile."""
    G, T = u.points.shape[3], max(u.T, v.T)
    side = max(1, root(limits.cached(CACHED) // (3 * G * u.rows[0] * v.rows[0])))
    unfolded = max(x.lefts * x.p + x.rights * x.q for x in map(Sizes.of, (u, v))) * G * T
    step = min(_step(u.rows, T, side, u is v), max(1, limits.elements * u.rows[1] // (2 * unfolded)))

    def tile(x: Conv, y: Conv) -> Tensor:
        left = x.to(limits.dtype).outer()
        right = left if x is y else y.to(limits.dtype).outer()
        return pairwise(left, right, limits)

    return over_samples(u, v, step, tile)


def _step(rows: tuple[int, int], T: int, side: int, same: bool) -> int:
    """Samples of a tile: ``side`` positions, and tiles enough to leave out half of them."""
    K, B = rows
    step = max(1, side // T)
    return min(step, max(-(-LEAF // (K * T)), -(-B // HALVES))) if same else step


def _tile(x: Outer, y: Outer, dtype: torch.dtype) -> Tensor:
    left, right = (_products(p, q, dtype) for p, q in zip(x.factors, y.factors, strict=True))
    both = left * right  # [G, K₁, b, T₁, T₂, K₂, b']
    both = both.sum((3, 4)) if both.shape[3] * both.shape[4] > 1 else both.flatten(2, 4)
    both = both.sum(0) if len(both) > 1 else both[0]
    return both.expand(*x.rows, *y.rows).contiguous()


def _products(x: Tensor, y: Tensor, dtype: torch.dtype) -> Tensor:
    """Inner products of features, ``[G, K₁ or 1, b or 1, T₁, T₂, K₂ or 1, b' or 1]``."""
    x, y = (shared(z, 1).to(dtype) for z in (x, y))
    left = x.permute(3, 0, 1, 2, 4)  # [G, ., b, T₁, features]
    if y.shape[2] > y.shape[0] * y.shape[1]:  # the longer stretch last: sums are over T₁ and T₂
        right = y.permute(3, 0, 1, 2, 4)
        found = left.flatten(1, 3) @ right.flatten(1, 3).mT
        return found.view(*left.shape[:4], *right.shape[1:4]).permute(0, 1, 2, 3, 6, 4, 5)
    right = y.permute(3, 2, 0, 1, 4)
    return (left.flatten(1, 3) @ right.flatten(1, 3).mT).view(*left.shape[:4], *right.shape[1:4])
