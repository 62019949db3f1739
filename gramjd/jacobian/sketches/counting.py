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
from gramjd.jacobian.projection import Places
from gramjd.jacobian.sketches.common import (
    COPIES,
    Live,
    Sides,
    Sketches,
    by_columns,
    factor_of,
    part_of,
    positions,
    summed_up,
)

_ROWS = 64  # that are made at once, so that each may have many entries
_FOURIER = 5  # entries of a row that take as long as one column at one position


def counted(live: Live, name: str, sides: Sides, sketches: Sketches) -> None:
    """Each entry goes to a column with a sign, of its own or of its two sides."""
    projection, limits, keep = sketches.projection, sketches.limits, sketches.keep
    device, dim = factor_of(live[0][1]).device, projection.dim
    if not projection.by_sides(sides) or projection.kind == "factored":

        def places(start: int, stop: int) -> Places:
            return projection.places(name, start, stop, device, limits.dtype, keep)

        by_entries(live, prod(sides), places, sketches)
        return
    first, rest = projection.places_of_sides(name, sides, device, limits.dtype, keep)

    def both(entries: Tensor) -> tuple[Tensor, Tensor]:
        i, j = entries // sides[1], entries % sides[1]
        return (first[0][i] + rest[0][j]) % dim, first[1][i] * rest[1][j]

    others = []
    for n, block in live:
        K, B = block.rows
        if isinstance(block, (Outer, Conv)) and _transformed(block, sides, dim):
            each = positions(block) * (dim * 4 + 2 * sum(sides)) * K
            for some in ranges(B, max(1, limits.elements // (2 * each))):
                piece = block.samples(*some)
                outer = piece.outer() if isinstance(piece, Conv) else piece
                sketches.add(n, _convolved(outer, first, rest, dim, limits.dtype), some)
        elif isinstance(block, Lookup):
            each = positions(block) * block.grain * (K + 4) + K * dim
            for some in ranges(B, max(1, limits.elements // (2 * each))):
                sketches.add(n, _looked_up(block.samples(*some), both, dim, limits.dtype), some)
        else:
            others.append((n, block))
    if others:
        by_entries(others, prod(sides), lambda a, b: both(torch.arange(a, b, device=device)), sketches)


def _transformed(block: Outer | Conv, sides: Sides, dim: int) -> bool:
    """Whether Fourier transforms at each position take less time than rows."""
    groups = block.points.shape[3] if isinstance(block, Conv) else block.c.shape[3]
    return groups == 1 and block.grain == sides[1] and _FOURIER * positions(block) * dim < prod(sides)


def _convolved(block: Outer, first: Places, rest: Places, dim: int, dtype: torch.dtype) -> Tensor:
    """``[K, B, dim]``: where columns add up, sketches of both sides are convolved, by Fourier transforms."""
    spectra = [
        torch.fft.rfft(by_columns(x.to(dtype), places, dim))
        for x, places in zip(block.factors, (first, rest), strict=True)
    ]  # [K or 1, B, T, 1, frequencies]
    return torch.fft.irfft((spectra[0] * spectra[1]).sum((2, 3)), dim)


def _looked_up(
    block: Lookup, both: Callable[[Tensor], tuple[Tensor, Tensor]], dim: int, dtype: torch.dtype
) -> Tensor:
    """``[K, B, dim]`` of a table: the entries that each sample looks up."""
    inside = torch.arange(block.grain, device=block.ids.device)
    columns, signs = both(block.ids[..., None] * block.grain + inside)  # [B, T, d]
    signed = (block.c.to(dtype) * signs).flatten(2)
    which = torch.arange(len(columns), device=columns.device)[:, None] * dim + columns.flatten(1)
    zeros = signed.new_zeros(len(signed), which.shape[0] * dim)
    return summed_up(zeros, which.flatten(), signed.flatten(1)).unflatten(1, (-1, dim))


def by_entries(live: Live, entries: int, places: Callable[[int, int], Places], sketches: Sketches) -> None:
    """Each entry goes to one column."""
    limits, dim = sketches.limits, sketches.projection.dim
    few = Limits(max(1, limits.elements // 4), limits.dtype)
    grain = lcm(*(block.grain for _, block in live))
    most, half = max(prod(block.rows) for _, block in live), max(1, limits.elements // 2)
    for begin, end in ranges(entries // grain, half // (min(most, _ROWS) * COPIES) // grain):
        start, stop = begin * grain, end * grain
        found = places(start, stop)
        build = part_of(start, stop, limits.dtype)
        for n, block in live:
            K, B = block.rows
            for some in ranges(B, min(half // (K * max(stop - start, dim) * COPIES), max(1, _ROWS // K))):
                piece = block.samples(*some)
                rows = matrix(piece, few, piece.workspace(limits.dtype), build)  # [b K, stop - start]
                sketches.add_entries(n, rows.unflatten(0, (-1, K)).transpose(0, 1), found, some)
