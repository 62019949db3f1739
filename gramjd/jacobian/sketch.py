"""Random projections ``J Ω`` of the rows of a Jacobian, some entries of a parameter at a time.

For rows ``x`` and ``y`` of ``J``, ``E[⟨xΩ, yΩ⟩] = ⟨x, y⟩``. With ``n`` columns the variance is

    rademacher  (‖x‖²‖y‖² + ⟨x, y⟩² - 2 Σ_i x_i² y_i²) / n
    gaussian    (‖x‖²‖y‖² + ⟨x, y⟩²) / n
    countsketch at most that of rademacher, or, of matrices with many entries, at most
                (‖N‖² + ‖M‖² + 2 t + 2 ‖x‖²‖y‖² + 2 ⟨x, y⟩²) / n
    factored    of a matrix, for rows X and Y, N = XᵀY, M = YXᵀ, t = tr(N²), at most
                v + ((1 + s²) ‖x‖²‖y‖² + ⟨x, y⟩² + v) / n, where
                v = (‖N‖² + t) / r + (‖M‖² + t) / l + (‖N‖² + ‖M‖² + ‖X‖²‖Y‖² + ⟨X, Y⟩²) / (l r)
                is the variance of LᵀXR, s² ‖x‖²‖y‖² the largest that it can be, and 1 / l or 1 / r are zero
                for a side that is not projected. The entries of LᵀXR go to columns of the sketch, as do
                those of a parameter with small sides or one, whose variance is at most that of rademacher.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from math import lcm, prod

import torch
import torch.nn.functional as F
from torch import Tensor

from gramjd.blocks import Block, Conv, Lookup, Outer, merge
from gramjd.blocks.conv import covered
from gramjd.blocks.lookup import scattered
from gramjd.contraction import Options, ranges, sum_of
from gramjd.contraction.options import Limits
from gramjd.contraction.products import Part
from gramjd.contraction.rows import matrix
from gramjd.internals import is_ours, runs_plainly
from gramjd.jacobian.projection import Places, Projection
from gramjd.rounding import own_precision

_CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)
_COPIES = 3  # of rows, that making them may take
_CACHED = 2**20  # elements of Ω that are made at once
_ROWS = 64  # that are made at once, so that each may have many entries
_SPARSE = 4  # entries of a table in use, for each that one sample looks up, from which on rows are not built

_FOURIER = 5  # entries of a row that take as long as one column at one position
_POSITIONS = 16  # of a sample, from which on products for each of them are the fastest

Sides = tuple[int, int]  # of a parameter as a matrix: its first dimension, and all others


@own_precision
def sketch(parts: Sequence[Part], names: Sequence[str], parameters: Sequence[Tensor], K: int,
           projection: Projection, options: Options, like: Tensor) -> Tensor:  # fmt: skip
    """``J Ω [K, B, dim]``, for real parameters.

    Raises:
        ValueError: two parameters have one name, and would share their rows of ``Ω``.
    """
    if len(set(names)) < len(names):
        twice = next(name for name in names if list(names).count(name) > 1)
        raise ValueError(f"A sketch knows parameters by name, and two are named {twice!r}: rename one.")
    dtype = options.accumulated(like.dtype)
    limits = Limits(max(1, options.budget(like.device) // dtype.itemsize), dtype)
    # For few samples, making the factors of Ω takes as long as their products. A budget has no room for them.
    keep = projection.kind in ("factored", "countsketch") and options.memory_budget is None
    keep = keep and runs_plainly([like]) and not torch.is_inference_mode_enabled()
    found = [torch.zeros(K, part.samples, projection.dim, dtype=dtype, device=like.device) for part in parts]
    for number, (name, parameter) in enumerate(zip(names, parameters, strict=True)):
        live = [(n, block) for n, part in enumerate(parts) for block in merge(part.live(number))]
        if live:
            for n, share in _shares(live, name, tuple(parameter.shape), projection, limits, keep):
                found[n] = found[n] + share
    return torch.cat(found, 1) / projection.dim**0.5


Live = Sequence[tuple[int, Block]]  # blocks, and of which part they are
Shares = Iterator[tuple[int, Tensor]]  # [K, B, dim], to be added to that of this part


def _shares(live: Live, name: str, shape: tuple[int, ...], projection: Projection, limits: Limits,
            keep: bool) -> Shares:  # fmt: skip
    """The shares of one parameter in the sketch."""
    sides = (shape[0], prod(shape[1:])) if shape else (1, 1)
    if projection.kind == "factored" and projection.columns(sides) != sides:  # whatever the blocks are
        yield from _grids(live, name, sides, projection, limits, keep)
        return
    if projection.kind in ("factored", "countsketch"):
        yield from _hashed(live, name, sides, projection, limits, keep)
        return
    looked_up = [(n, b) for n, b in live if isinstance(b, Lookup) and is_ours(b.ids)]
    for n, block in looked_up:  # of a table, rows of Ω for the entries that are used
        used, ids = block.ids.unique(return_inverse=True)
        if ids.device.type == "cpu" and len(used) > _SPARSE * ids.shape[1]:
            yield n, _by_entry(block, ids, used, name, projection, limits)
            continue
        few = replace(block, ids=ids, shape=(len(used), block.grain))
        yield from _products([(n, few)], name, projection, limits, keep, used)
    done = {id(b) for _, b in looked_up}
    rest = [(n, b) for n, b in live if id(b) not in done]
    if rest:
        yield from _products(rest, name, projection, limits, keep)


def _grids(live: Live, name: str, sides: Sides, projection: Projection, limits: Limits, keep: bool
           ) -> Shares:  # fmt: skip
    """A factored sketch of matrices: projected from both sides, or one, before entries go to columns."""
    like, columns = _factor(live[0][1]), projection.columns(sides)
    left, right = projection.factors(name, sides, like, limits.dtype, keep)
    places = projection.places(name, 0, prod(columns), like, limits.dtype, keep)
    for n, block in live:
        shares = []
        for some in ranges(block.rows[1], _samples(block, columns, projection.dim, limits)):
            grid = _factored(block.samples(*some), sides, left, right, limits)
            grid = (grid if columns[0] <= columns[1] else grid.mT).flatten(2)
            shares.append(_added(grid.flatten(0, 1), *places, projection.dim).unflatten(0, grid.shape[:2]))
        yield n, torch.cat(shares, 1)


def _hashed(live: Live, name: str, sides: Sides, projection: Projection, limits: Limits, keep: bool
            ) -> Shares:  # fmt: skip
    """Each entry goes to a column with a sign, of its own or of its two sides."""
    like, dim = _factor(live[0][1]), projection.dim
    if not projection.by_sides(sides) or projection.kind == "factored":

        def places(start: int, stop: int) -> Places:
            return projection.places(name, start, stop, like, limits.dtype, keep)

        yield from _entries(live, prod(sides), places, dim, limits)
        return
    first, rest = projection.places_of_sides(name, sides, like, limits.dtype, keep)

    def both(entries: Tensor) -> Places:
        i, j = entries // sides[1], entries % sides[1]
        return (first[0][i] + rest[0][j]) % dim, first[1][i] * rest[1][j]

    others = []
    for n, block in live:
        K, B = block.rows
        if isinstance(block, (Outer, Conv)) and _transformed(block, sides, dim):
            each = _positions(block) * (dim * 4 + 2 * sum(sides)) * K
            shares = []
            for some in ranges(B, max(1, limits.elements // (2 * each))):
                piece = block.samples(*some)
                outer = piece.outer() if isinstance(piece, Conv) else piece
                shares.append(_convolved(outer, first, rest, dim, limits.dtype))
            yield n, torch.cat(shares, 1)
        elif isinstance(block, Lookup):
            each = _positions(block) * block.grain * (K + 4) + K * dim
            pieces = ranges(B, max(1, limits.elements // (2 * each)))
            shares = [_looked_up(block.samples(*some), both, dim, limits.dtype) for some in pieces]
            yield n, torch.cat(shares, 1)
        else:
            others.append((n, block))
    if others:
        yield from _entries(
            others, prod(sides), lambda a, b: both(torch.arange(a, b, device=like.device)), dim, limits
        )


def _transformed(block: Outer | Conv, sides: Sides, dim: int) -> bool:
    """Whether Fourier transforms at each position take less time than rows."""
    groups = block.points.shape[3] if isinstance(block, Conv) else block.c.shape[3]
    return groups == 1 and block.grain == sides[1] and _FOURIER * _positions(block) * dim < prod(sides)


def _convolved(block: Outer, first: Places, rest: Places, dim: int, dtype: torch.dtype) -> Tensor:
    """``[K, B, dim]``: where columns add up, sketches of both sides are convolved, by Fourier transforms."""
    spectra = [
        torch.fft.rfft(_added(x.to(dtype).flatten(0, -2), *places, dim)).unflatten(0, x.shape[:-1])
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


def _entries(live: Live, entries: int, places: Callable[[int, int], Places], dim: int, limits: Limits
             ) -> Shares:  # fmt: skip
    """Each entry goes to one column."""
    few = Limits(max(1, limits.elements // 4), limits.dtype)
    grain = lcm(*(block.grain for _, block in live))
    most, half = max(prod(block.rows) for _, block in live), max(1, limits.elements // 2)
    for begin, end in ranges(entries // grain, half // (min(most, _ROWS) * _COPIES) // grain):
        start, stop = begin * grain, end * grain
        found = places(start, stop)
        build = _part(start, stop, limits.dtype)
        for n, block in live:
            K, B = block.rows
            shares = []
            for some in ranges(B, min(half // (K * max(stop - start, dim) * _COPIES), max(1, _ROWS // K))):
                piece = block.samples(*some)
                rows = matrix(piece, few, piece.workspace(limits.dtype), build)  # [b K, stop - start]
                share = _added(rows, *found, dim).unflatten(0, (some[1] - some[0], K))
                shares.append(share.transpose(0, 1))
            yield n, torch.cat(shares, 1)


def _added(rows: Tensor, columns: Tensor, signs: Tensor, dim: int) -> Tensor:
    """``[n, dim]``: entries of ``rows [n, P]`` added up in the columns that each goes to."""
    return _summed_up(rows.new_zeros(len(rows), dim), columns, rows * signs)


def _summed_up(zeros: Tensor, columns: Tensor, values: Tensor) -> Tensor:
    """``values [n, P]`` added to the columns of ``zeros``, always in one order."""
    if zeros.device.type == "cpu":
        return zeros.index_add(1, columns, values)
    return zeros.mT.index_put((columns,), values.mT, accumulate=True).mT


def _products(live: Live, name: str, projection: Projection, limits: Limits, keep: bool,
              used: Tensor | None = None) -> Shares:  # fmt: skip
    """Rows by ``Ω``, some entries at a time; ``used``: which pieces of ``grain`` entries theirs are."""
    like, entries = _factor(live[0][1]), prod(live[0][1].shape)
    grain = lcm(*(block.grain for _, block in live))
    most, half = max(prod(block.rows) for _, block in live), max(1, limits.elements // 2)
    most_of_omega = max(1, half // (projection.dim * projection.working(limits.dtype)))  # entries
    step = min(half // (most * _COPIES), most_of_omega, max(1, _CACHED // projection.dim)) // grain
    few = Limits(max(1, limits.elements // 4), limits.dtype)

    def omega_of(start: int, stop: int) -> Tensor:
        """Rows of Ω for some of the entries."""
        if used is None:
            return projection.span(name, start, stop, like, limits.dtype, keep)
        which = torch.arange(start, stop, device=like.device)
        return projection.rows(name, used[which // grain] * grain + which % grain, limits.dtype)

    for begin, end in ranges(entries // grain, step):
        start, stop = begin * grain, end * grain
        slabs = ranges(stop - start, most_of_omega)  # several, if one grain is too much
        omega = omega_of(start, stop) if len(slabs) == 1 else None
        build = _part(start, stop, limits.dtype)
        for n, block in live:
            K, B = block.rows
            for some in ranges(B, half // (K * (stop - start) * _COPIES)):
                piece = block.samples(*some)
                rows = matrix(piece, few, piece.workspace(limits.dtype), build)  # [b K, stop - start]
                for a, b in slabs:
                    mine = omega_of(start + a, start + b) if omega is None else omega
                    share = (rows[:, a:b] @ mine).unflatten(0, (some[1] - some[0], K)).transpose(0, 1)
                    yield n, F.pad(share, (0, 0, some[0], B - some[1]))


def _by_entry(block: Lookup, ids: Tensor, used: Tensor, name: str, projection: Projection, limits: Limits
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


def _part(start: int, stop: int, dtype: torch.dtype) -> Callable[[Block], Tensor]:
    return lambda block: block.part(start, stop, dtype)


def _factor(block: Block) -> Tensor:
    """One of the tensors that a block is made of."""
    if isinstance(block, (Outer, Conv)):
        return block.factors[0]
    return block.c if isinstance(block, Lookup) else block.values


def _positions(block: Block) -> int:
    """Of one sample, those of several groups each."""
    if isinstance(block, Conv):
        return block.T * block.points.shape[3]
    if isinstance(block, Outer):
        return block.lines * block.c.shape[3]
    return block.ids.shape[1] if isinstance(block, Lookup) else 0


def _samples(block: Block, columns: Sides, dim: int, limits: Limits) -> int:
    """How many at a time."""
    positions = _positions(block)
    each = block.rows[0] * (positions * sum(columns) + 2 * prod(columns) + 2 * dim)
    copied = _factor(block).numel() // max(1, block.rows[1])
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
