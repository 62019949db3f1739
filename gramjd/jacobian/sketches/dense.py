"""Sketches of independent random numbers: rows, or lookups, by the rows of ``Ω``."""

from __future__ import annotations

from math import lcm, prod

import torch
from torch import Tensor

from gramjd.blocks import Lookup
from gramjd.contraction import ranges
from gramjd.contraction.options import Limits
from gramjd.contraction.rows import matrix
from gramjd.jacobian.projection import Projection
from gramjd.jacobian.sketches.common import COPIES, Live, Sketches, factor_of, part_of

_CACHED = 2**20  # elements of Ω that are made at once


def by_products(live: Live, name: str, sketches: Sketches, used: Tensor | None = None) -> None:
    """Rows by ``Ω``, some entries at a time; ``used``: which pieces of ``grain`` entries theirs are."""
    projection, limits, keep = sketches.projection, sketches.limits, sketches.keep
    device, entries = factor_of(live[0][1]).device, prod(live[0][1].shape)
    grain = lcm(*(block.grain for _, block in live))
    most, half = max(prod(block.rows) for _, block in live), max(1, limits.elements // 2)
    most_of_omega = max(1, half // (projection.dim * projection.working(limits.dtype)))  # entries
    step = min(half // (most * COPIES), most_of_omega, max(1, _CACHED // projection.dim)) // grain
    few = Limits(max(1, limits.elements // 4), limits.dtype)

    def omega_of(start: int, stop: int) -> Tensor:
        """Rows of Ω for some of the entries."""
        if used is None:
            return projection.span(name, start, stop, device, limits.dtype, keep)
        which = torch.arange(start, stop, device=device)
        return projection.rows(name, used[which // grain] * grain + which % grain, limits.dtype)

    for begin, end in ranges(entries // grain, step):
        start, stop = begin * grain, end * grain
        slabs = ranges(stop - start, most_of_omega)  # several, if one grain is too much
        omega = omega_of(start, stop) if len(slabs) == 1 else None
        build = part_of(start, stop, limits.dtype)
        for n, block in live:
            K, B = block.rows
            for some in ranges(B, half // (K * (stop - start) * COPIES)):
                piece = block.samples(*some)
                rows = matrix(piece, few, piece.workspace(limits.dtype), build)  # [b K, stop - start]
                for a, b in slabs:
                    mine = omega_of(start + a, start + b) if omega is None else omega
                    share = (rows[:, a:b] @ mine).unflatten(0, (some[1] - some[0], K)).transpose(0, 1)
                    sketches.add(n, share, some)


def by_lookups(block: Lookup, ids: Tensor, used: Tensor, name: str, projection: Projection, limits: Limits
              ) -> Tensor:  # fmt: skip
    """``[K, B, dim]`` of a table, from what each entry in use was looked up for.

    Most of a sample's row is zero, as it looks up few of the entries that the batch uses: multiply-adds are
    ``T`` of ``len(used)`` of those of rows. ``index_add_`` is deterministic on a CPU.
    """
    (K, B), T, grain, dim = block.rows, ids.shape[1], block.grain, projection.dim
    c, order = block.c.flatten(1, 2), ids.flatten().argsort(stable=True)
    samples, ends = order // T, ids.flatten().bincount(minlength=len(used)).cumsum(0).tolist()
    half = max(1, limits.elements // 2)
    most = max(1, min(half // (dim * projection.working(limits.dtype)), _CACHED // dim))  # entries of Ω
    total = block.c.new_zeros(K, B, dim, dtype=limits.dtype)
    for first, last in ranges(len(used), most // grain):
        for a, b in ranges(grain, most):  # several, if one entry of the table is too much
            which = (used[first:last, None] * grain + torch.arange(a, b, device=ids.device)).flatten()
            omega = projection.rows(name, which, limits.dtype).unflatten(0, (last - first, b - a))
            for entry in range(first, last):
                start, stop = ends[entry - 1] if entry else 0, ends[entry]
                for x, y in ranges(stop - start, half // (K * (dim + grain))):
                    some = slice(start + x, start + y)
                    mine = c[:, order[some], a:b].to(limits.dtype) @ omega[entry - first]
                    total.index_add_(1, samples[some], mine)
    return total
