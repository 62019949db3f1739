"""Count sketches: each entry is added to one column, with a random sign."""

from __future__ import annotations

from collections.abc import Callable
from math import lcm, prod

import torch
from torch import Tensor

from gramjd.blocks import Conv, Lookup, Outer
from gramjd.contraction import ranges
from gramjd.contraction.options import Limits
from gramjd.contraction.rows import matrix
from gramjd.jacobian.projection import Places, Projection
from gramjd.jacobian.sketches.common import COPIES, Live, Shares, Sides, factor_of, part_of, positions

_ROWS = 64  # that are made at once, so that each may have many entries
_FOURIER = 5  # entries of a row that take as long as one column at one position


def counted(live: Live, name: str, sides: Sides, projection: Projection, limits: Limits, keep: bool
            ) -> Shares:  # fmt: skip
    """Each entry goes to a column with a sign, of its own or of its two sides."""
    like, dim = factor_of(live[0][1]), projection.dim
    if not projection.by_sides(sides) or projection.kind == "factored":

        def places(start: int, stop: int) -> Places:
            return projection.places(name, start, stop, like, limits.dtype, keep)

        yield from by_entries(live, prod(sides), places, dim, limits)
        return
    first, rest = projection.places_of_sides(name, sides, like, limits.dtype, keep)

    def both(entries: Tensor) -> Places:
        i, j = entries // sides[1], entries % sides[1]
        return (first[0][i] + rest[0][j]) % dim, first[1][i] * rest[1][j]

    others = []
    for n, block in live:
        K, B = block.rows
        if isinstance(block, (Outer, Conv)) and _transformed(block, sides, dim):
            each = positions(block) * (dim * 4 + 2 * sum(sides)) * K
            shares = []
            for some in ranges(B, max(1, limits.elements // (2 * each))):
                piece = block.samples(*some)
                outer = piece.outer() if isinstance(piece, Conv) else piece
                shares.append(_convolved(outer, first, rest, dim, limits.dtype))
            yield n, torch.cat(shares, 1)
        elif isinstance(block, Lookup):
            each = positions(block) * block.grain * (K + 4) + K * dim
            pieces = ranges(B, max(1, limits.elements // (2 * each)))
            shares = [_looked_up(block.samples(*some), both, dim, limits.dtype) for some in pieces]
            yield n, torch.cat(shares, 1)
        else:
            others.append((n, block))
    if others:
        yield from by_entries(
            others, prod(sides), lambda a, b: both(torch.arange(a, b, device=like.device)), dim, limits
        )


def _transformed(block: Outer | Conv, sides: Sides, dim: int) -> bool:
    """Whether Fourier transforms at each position take less time than rows."""
    groups = block.points.shape[3] if isinstance(block, Conv) else block.c.shape[3]
    return groups == 1 and block.grain == sides[1] and _FOURIER * positions(block) * dim < prod(sides)


def _convolved(block: Outer, first: Places, rest: Places, dim: int, dtype: torch.dtype) -> Tensor:
    """``[K, B, dim]``: where columns add up, sketches of both sides are convolved, by Fourier transforms."""
    spectra = [
        torch.fft.rfft(added(x.to(dtype).flatten(0, -2), *places, dim)).unflatten(0, x.shape[:-1])
        for x, places in zip(block.factors, (first, rest), strict=True)
    ]  # [K or 1, B, T, 1, frequencies]
    return torch.fft.irfft((spectra[0] * spectra[1]).sum((2, 3)), dim)


def _looked_up(block: Lookup, both: Callable[[Tensor], Places], dim: int, dtype: torch.dtype) -> Tensor:
    """``[K, B, dim]`` of a table: the entries that each sample looks up."""
    inside = torch.arange(block.grain, device=block.ids.device)
    columns, signs = both(block.ids[..., None] * block.grain + inside)  # [B, T, d]
    signed = (block.c.to(dtype) * signs).flatten(2)
    which = torch.arange(len(columns), device=columns.device)[:, None] * dim + columns.flatten(1)
    zeros = signed.new_zeros(len(signed), which.shape[0] * dim)
    return _summed_up(zeros, which.flatten(), signed.flatten(1)).unflatten(1, (-1, dim))


def by_entries(live: Live, entries: int, places: Callable[[int, int], Places], dim: int, limits: Limits
             ) -> Shares:  # fmt: skip
    """Each entry goes to one column."""
    few = Limits(max(1, limits.elements // 4), limits.dtype)
    grain = lcm(*(block.grain for _, block in live))
    most, half = max(prod(block.rows) for _, block in live), max(1, limits.elements // 2)
    for begin, end in ranges(entries // grain, half // (min(most, _ROWS) * COPIES) // grain):
        start, stop = begin * grain, end * grain
        found = places(start, stop)
        build = part_of(start, stop, limits.dtype)
        for n, block in live:
            K, B = block.rows
            shares = []
            for some in ranges(B, min(half // (K * max(stop - start, dim) * COPIES), max(1, _ROWS // K))):
                piece = block.samples(*some)
                rows = matrix(piece, few, piece.workspace(limits.dtype), build)  # [b K, stop - start]
                share = added(rows, *found, dim).unflatten(0, (some[1] - some[0], K))
                shares.append(share.transpose(0, 1))
            yield n, torch.cat(shares, 1)


def added(rows: Tensor, columns: Tensor, signs: Tensor, dim: int) -> Tensor:
    """``[n, dim]``: entries of ``rows [n, P]`` added up in the columns that each goes to."""
    return _summed_up(rows.new_zeros(len(rows), dim), columns, rows * signs)


def _summed_up(zeros: Tensor, columns: Tensor, values: Tensor) -> Tensor:
    """``values [n, P]`` added to the columns of ``zeros``, always in one order."""
    if zeros.device.type == "cpu":
        return zeros.index_add(1, columns, values)
    return zeros.mT.index_put((columns,), values.mT, accumulate=True).mT
