"""Factored sketches: random matrices for both sides of a parameter, so that no row is formed."""

from __future__ import annotations

from math import lcm, prod

import torch
import torch.nn.functional as F
from torch import Tensor

from gramjd.blocks import Block, Conv, Lookup, Outer
from gramjd.blocks.conv import covered
from gramjd.blocks.lookup import scattered
from gramjd.contraction import ranges, sum_of
from gramjd.contraction.options import Limits
from gramjd.jacobian.sketches.common import Live, Sides, Sketches, factor_of, positions

_CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)
_POSITIONS = 16  # of a sample, from which on products for each of them are the fastest


def factored(live: Live, name: str, sides: Sides, sketches: Sketches) -> None:
    """A factored sketch of matrices: projected from both sides, or one, before entries go to columns."""
    projection, limits, keep = sketches.projection, sketches.limits, sketches.keep
    device, columns = factor_of(live[0][1]).device, projection.columns(sides)
    left, right = projection.factors(name, sides, device, limits.dtype, keep)
    places = projection.places(name, 0, prod(columns), device, limits.dtype, keep)
    for n, block in live:
        for some in ranges(block.rows[1], _samples(block, columns, projection.dim, limits)):
            grid = _factored(block.samples(*some), sides, left, right, limits)
            grid = (grid if columns[0] <= columns[1] else grid.mT).flatten(2)
            sketches.add_entries(n, grid, places, some)


def _samples(block: Block, columns: Sides, dim: int, limits: Limits) -> int:
    """How many at a time."""
    count = positions(block)
    each = block.rows[0] * (count * sum(columns) + 2 * prod(columns) + 2 * dim)
    copied = factor_of(block).numel() // max(1, block.rows[1])
    if isinstance(block, (Outer, Conv)):
        copied += block.factors[1].numel() // max(1, block.rows[1])
    return max(1, limits.elements // (2 * (each + copied)))


Side = Tensor | None  # of a random matrix, transposed: [columns, features]; None is the identity


def _factored(block: Block, sides: Sides, left: Side, right: Side, limits: Limits) -> Tensor:
    """``Lᵀ X R [K, B, l, r]`` of rows that are matrices ``X`` of these sides."""
    dtype = limits.dtype
    if isinstance(block, Conv):
        return _of_conv(block, left, right, dtype)
    if block.grain == sides[1]:
        if isinstance(block, Lookup):
            c = _by(right, block.c.to(dtype))  # [K, B, r, T]
            if left is None:
                return scattered(c.mT, block.ids, block.entries).transpose(0, 1)
            return torch.einsum("lbt,kbrt->kblr", left[:, block.ids], c)
        if isinstance(block, Outer):
            x, y = (factor.to(dtype) for factor in block.factors)  # [K or 1, B, T, G, p and q]
            y = _by(right, y.flatten(2, 3)).unflatten(3, y.shape[2:4])  # [K or 1, B, r, T, G]
            return _summed(x, left, y)
    grain = lcm(block.grain, sides[1])
    some = grain // sides[1]
    step = max(1, limits.elements // max(1, grain * prod(block.rows)))
    shares = []
    for begin, end in ranges(sides[0] // some, step):
        rows = block.part(begin * grain, end * grain, dtype).unflatten(2, (-1, sides[1]))  # [B, K, ., rest]
        found = _by(right, rows)  # [B, K, r, .]
        if left is None:
            shares.append(found.permute(1, 0, 3, 2))
        else:
            shares.append(torch.einsum("bkrp,lp->kblr", found, left[:, begin * some : end * some]))
    if left is None:
        return torch.cat(shares, 2)
    total = sum_of(shares)
    assert total is not None
    return total


def _summed(x: Tensor, left: Side, y: Tensor) -> Tensor:
    """``Σ_t (Lᵀ x_t) y_tᵀ [K, B, l, r]`` of ``x [K or 1, B, T, G, p]`` and ``y [K or 1, B, r, T, G]``."""
    if x.shape[3] == 1:
        x, y = _by(left, x.squeeze(3)), y.squeeze(4)  # [K or 1, B, l, T]
        if x.shape[2] < y.shape[2]:
            return torch.einsum("kblt,jbrt->kjblr", x, y).flatten(0, 1)
        return torch.einsum("jbrt,kblt->kjbrl", y, x).flatten(0, 1).mT
    if left is None:  # the features of each group have rows of their own
        return torch.einsum("kbtgp,jbrtg->kjbgpr", x, y).flatten(0, 1).flatten(2, 3)
    x = torch.einsum("kbtgp,lgp->kbtgl", x, left.unflatten(1, x.shape[3:]))
    return torch.einsum("kbtgl,jbrtg->kjblr", x, y).flatten(0, 1)


def _by(side: Side, x: Tensor) -> Tensor:
    """``x [*, T, p]`` by a side of a projection: ``[*, columns, T]``.

    On a CPU, products of few rows are up to twice as fast as those of few columns, and copy nothing where
    positions are last, as in cotangents of a loss with classes first.
    """
    if side is None:
        return x.mT
    if x.shape[-2] < _POSITIONS:
        return (x.flatten(0, -2) @ side.mT).unflatten(0, x.shape[:-1]).mT
    lead, x = x.shape[:-2], x.flatten(0, -3)
    return torch.bmm(side.expand(len(x), *side.shape), x.mT).unflatten(0, lead)


def _of_conv(block: Conv, left: Side, right: Side, dtype: torch.dtype) -> Tensor:
    """The windows by a convolution with ``R``, which unfolds nothing."""
    points, windows = (factor.to(dtype) for factor in block.factors)
    if right is None:  # the longer side are the features of the points
        right = torch.eye(block.grain, dtype=dtype, device=points.device)
    G, r = points.shape[3], len(right)
    kernel = right.reshape(r, *block.shape[1:]).repeat(G, *[1] * (len(block.shape) - 1))
    flat = covered(block, windows.flatten(0, 1).flatten(2, 3)).flatten(0, 1)
    out = _CONVOLUTIONS[len(block.kernel) - 1](flat, kernel, None, block.stride, 0, block.dilation, G)
    out = out.flatten(2).unflatten(1, (G, r)).unflatten(0, windows.shape[:3])  # [K or 1, B, m, G, r, .]
    x = points.flatten(5).movedim(5, 3).flatten(2, 3)  # [K or 1, B, positions, G, p]
    return _summed(x, left, out.permute(0, 1, 4, 2, 5, 3).flatten(3, 4))
