"""Plans of convolutions: five ways to build their rows, some features of the points at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product as tuples
from math import prod
from typing import Any

import torch
from torch import Tensor

from gramjd.blocks import Conv
from gramjd.blocks.conv import weight_gradient
from gramjd.contraction.cost import SMALL, Cost, Plan, half
from gramjd.contraction.options import Limits, allows_tf32
from gramjd.contraction.pairwise import Sizes
from gramjd.contraction.rows import matrix, together
from gramjd.contraction.tiles import added, canonical, over_samples, product, ranges
from gramjd.internals import is_ours

CACHED = 2**21  # elements of the rows that are built at once


class Room:
    """Memory that is filled again and again: fresh pages take longer to get than to fill."""

    def __init__(self, block: Conv) -> None:
        self._held: Tensor | None = None
        # where nothing is differentiated: that would need what was in it before
        self._reused = all(map(is_ours, block.factors))

    def filled(self, x: Tensor) -> Tensor:
        """A contiguous copy, valid until the next one."""
        if x.is_contiguous() or not self._reused:
            return x.contiguous()
        if self._held is None or self._held.numel() < x.numel():
            found = x.contiguous()
            self._held = found.view(-1)
            return found
        return self._held[: x.numel()].view(x.shape).copy_(x)


def unfolded(block: Conv, room: Room) -> Tensor:
    """All windows as a matrix for each sample, in one product."""
    n = len(block.kernel)
    out, kernel = range(5, 5 + n), range(5 + n, 5 + 2 * n)
    windows = block.taps().permute([0, 1, 3, 4, *kernel, 2, *out])  # [., B, G, q, *kernel, m, *out]
    windows = room.filled(windows).view(*windows.shape[:3], -1, block.T)
    return _products(block, _points(block), windows)


def lined(block: Conv, room: Room) -> Tensor:
    """The windows unfolded along all dimensions but the first, where each tap takes other lines of them."""
    n, k, l = len(block.kernel), *map(len, block.factors)  # one of k and l is 1  # noqa: E741
    rooms = [room, *(Room(block) for _ in range(1, block.stride[0]))]
    points = block.points.permute([1, 2, 3, 0, *range(4, 5 + n)])
    points = points.flatten(3, 4).flatten(4)  # [B, m, G, k p, T]
    windows = block.taps(1).permute([1, 2, 3, 0, 4, *range(5 + n, 4 + 2 * n), *range(5, 5 + n)])
    step, high, found = block.stride[0], block.points.shape[5], []
    unfolded: dict[int, Tensor] = {}  # by the first line: [B, m, G, l q taps, lines, *out]
    for tap in range(block.kernel[0]):
        skipped, first = divmod(tap * block.dilation[0], step)
        if first not in unfolded:
            lines = windows[(slice(None),) * (4 + n) + (slice(first, None, step),)]
            unfolded[first] = rooms[first].filled(lines).flatten(3, 3 + n)
        shifted = unfolded[first].narrow(4, skipped, high).flatten(4)  # a view: no copy for each tap
        found.append((points @ shifted.mT).sum(1))
    rows = torch.stack(found, -1)  # [B, G, k p, l q taps, taps of the first dimension]
    rows = rows.unflatten(3, (l, block.windows.shape[4], -1)).unflatten(2, (k, -1))
    return rows.permute(0, 2, 4, 1, 3, 5, 7, 6).reshape(len(rows), block.rows[0], -1)


def tapped(block: Conv, room: Room, tap: Sequence[int]) -> Tensor:
    """The windows at one tap of the kernel."""
    windows = _at(block, tap).transpose(2, 3).transpose(3, 4)  # [., B, G, q, m, *out]
    windows = room.filled(windows).flatten(4)
    return _products(block, _points(block), windows)


def depthwise(block: Conv, room: Room, tap: Sequence[int]) -> Tensor:
    """The windows at one tap of the kernel, entry by entry: for one or two features a group."""
    windows = _at(block, tap)
    parts = [
        (block.points[:, :, :, :, p] * windows[:, :, :, :, q]).flatten(4).sum(4).sum(2)  # [K, B, G]
        for p in range(block.points.shape[4])
        for q in range(block.windows.shape[4])
    ]
    return (torch.cat(parts, 2) if len(parts) > 1 else parts[0]).transpose(0, 1)


def grouped(block: Conv, room: Room) -> Tensor:
    """One ordinary weight gradient, with the samples as groups of the convolution."""
    (K, B), (G, p) = block.rows, block.points.shape[3:5]
    points, windows = (x.transpose(0, 2).transpose(2, 3) for x in (block.points, block.windows))
    points, windows = points.flatten(1, 4), windows.flatten(1, 4)  # [m, B G K p, *out]
    found = weight_gradient(block, points[None], windows[None], B * G)  # [B G K p, K q, *kernel]
    k, l = len(block.points), len(block.windows)  # one of them is 1  # noqa: E741
    rows = found.reshape(B, G, k, p, l, -1).permute(0, 2, 4, 1, 3, 5)
    return rows.reshape(B, K, -1)


def _at(block: Conv, tap: Sequence[int]) -> Tensor:
    """The entries of the windows at one tap, ``[K or 1, B, m, G, q, *out]``."""
    taps = block.taps()
    for place in reversed(tap):
        taps = taps[..., place]
    return taps


def _products(block: Conv, points: Tensor, windows: Tensor) -> Tensor:
    """``Σ_t`` of products of ``[K or 1, B, G, p, T]`` and ``[K or 1, B, G, q, T]``: ``[B, K, G p q]``."""
    if len(points) == len(windows) == 1:  # one objective: fewer ops
        found = points.flatten(0, 2).bmm(windows.flatten(0, 2).mT)
    else:
        found = torch.einsum("kbgpt,lbgqt->bklgpq", points, windows)
    return found.reshape(block.rows[1], block.rows[0], -1)


def _points(block: Conv) -> Tensor:
    """The points with their positions flattened, ``[K or 1, B, G, p, T]``."""
    points = block.points.transpose(2, 3).transpose(3, 4)
    return points.reshape(*points.shape[:4], -1)


@dataclass(frozen=True)
class Method:
    """One way to build the rows of convolutions."""

    name: str
    # a block, room, and a tap if it goes by taps → [B, K, entries] in its own order
    build: Callable[..., Tensor]
    by_taps: bool
    workspace: Callable[[Conv], int]  # elements for each sample besides the result
    cost: Callable[[Conv, Sizes, int], Cost]  # of a block with these sizes and number of taps

    def plan(self) -> Plan:
        return Plan(self.name, self.cost_of, self.run)

    def cost_of(self, u: Conv, v: Conv) -> Cost | None:
        """The cost to build the rows and to multiply them."""
        if not alike(u, v) or (self.build is grouped and rounded(u)):
            return None
        x, y, same = Sizes.of(u), Sizes.of(v), u is v
        n1, n2, P, taps = x.K * x.B, y.K * y.B, prod(u.shape), prod(u.kernel)
        costs = [self.cost(u, x, taps), *([] if same else [self.cost(v, y, taps)])]
        products = half(same, n1 * n2 * P, n1) + sum(cost.multiply_adds for cost in costs)
        built = P * (n1 + (0 if same else n2))
        moved = sum(cost.moved for cost in costs) + built
        calls = sum(cost.calls for cost in costs) + 2 * (taps if self.by_taps else 1)
        return Cost(products, moved, calls * (1 + built // CACHED), built)

    def run(self, u: Conv, v: Conv, limits: Limits) -> Tensor:
        """Rows of some features of the points at a time, multiplied and added up."""
        same, (G, p), q = u is v, u.points.shape[3:5], prod(u.shape[1:])
        n = u.rows[0] * u.rows[1] + (0 if same else v.rows[0] * v.rows[1])
        most, unfolded = max(u.rows[1], v.rows[1]), self.workspace(u) * u.rows[1]
        step = limits.cached(max(CACHED, 2 * unfolded)) // (n * G * q)  # unfolds anew for each slab
        if n * G * q > limits.elements and most > 1:
            fewer = max(1, most * limits.elements // (2 * n * G * q))
            return over_samples(u, v, min(-(-most // 2), fewer), lambda x, y: self.run(x, y, limits))
        taps: list[Any] = [*tuples(*map(range, u.kernel))] if self.by_taps else [None]

        def slab(some: tuple[int, int], tap: Any) -> Tensor:
            left = self._rows(u.features(*some), tap, limits)
            return product(left, left if same else self._rows(v.features(*some), tap, limits))

        total = added(slab(some, tap) for some in ranges(p, step) for tap in taps)
        return canonical(total, u.rows, v.rows)

    def rows(self, block: Conv, limits: Limits) -> Tensor:
        """All rows ``[B K, P]``, their entries in the parameter's order."""
        if not self.by_taps:
            (K, B), P = block.rows, prod(block.shape)
            few = ranges(B, CACHED // (K * P))
            return together((self._rows(block.samples(*some), None, limits) for some in few), K * B)
        taps = [self._rows(block, tap, limits) for tap in tuples(*map(range, block.kernel))]
        rows = torch.stack(taps, -1)  # [B K, entries at a tap, taps]
        if self.build is depthwise:  # these are in the order p, q, G
            rows = rows.unflatten(1, (-1, block.points.shape[3])).transpose(1, 2)
        return rows.flatten(1)

    def _rows(self, block: Conv, tap: Sequence[int] | None, limits: Limits) -> Tensor:
        at = () if tap is None else (tap,)
        few, room = Limits(limits.cached(CACHED), limits.dtype), Room(block)
        return matrix(block, few, self.workspace(block), lambda b: self.build(b.to(limits.dtype), room, *at))


def alike(u: Conv, v: Conv) -> bool:
    """Whether both blocks have the same groups."""
    return u.points.shape[3:5] == v.points.shape[3:5] and u.shape == v.shape


def rounded(block: Conv) -> bool:
    """Whether cuDNN would round the factors to TF32. It does by default, unlike matrix products."""
    return block.points.is_cuda and allows_tf32()


def _windows(block: Conv) -> int:
    """Elements of the windows at one tap, of one sample."""
    return len(block.windows) * block.T * block.points.shape[3] * block.windows.shape[4]


def _of_line(block: Conv) -> int:
    """Elements of the windows of one sample, unfolded along all dimensions but the first."""
    return _windows(block) * prod(block.kernel[1:]) * block.windows.shape[5] // block.points.shape[5]


def _products_cost(block: Conv, s: Sizes, times: int) -> tuple[int, int]:
    """Multiply-adds of so many products that give all rows together; elements read by them, in halves."""
    products = s.K * s.B * s.T * prod(block.shape) + SMALL * s.B * s.G * times
    return products, s.T * s.G * (s.rights * s.q + s.lefts * s.p * times)


def _unfolded_cost(block: Conv, s: Sizes, taps: int) -> Cost:
    products, read = _products_cost(block, s, 1)
    written = s.rights * s.T * s.G * s.q if taps > 1 else 0
    return Cost(products, written + read // 2, 6)


def _lined_cost(block: Conv, s: Sizes, taps: int) -> Cost:
    lines = block.kernel[0]
    products, read = _products_cost(block, s, lines)
    written = s.B * _of_line(block) + 2 * s.K * s.B * prod(block.shape)  # rows are put in order, too
    return Cost(products, written + read // 2, 6 * lines)


def _tapped_cost(block: Conv, s: Sizes, taps: int) -> Cost:
    products, read = _products_cost(block, s, taps)
    return Cost(products, s.rights * s.T * s.G * s.q + read // 2, 6 * taps)


def _depthwise_cost(block: Conv, s: Sizes, taps: int) -> Cost:
    return Cost(0, 2 * s.K * s.B * s.T * prod(block.shape), 4 * taps * s.p * s.q // taps)


def _grouped_cost(block: Conv, s: Sizes, taps: int) -> Cost:
    p, q = s.p * len(block.points), s.q * len(block.windows) // taps  # channels of the convolution
    if p * q == 1 and set(block.kernel) == {3}:  # has kernels of its own
        return Cost(2 * s.B * s.T * s.G * taps, s.B * s.G * (taps + 2 * s.T), 10)
    if p * q == 1:  # one small product after the other, slower still beyond 400 positions
        return Cost(s.B * s.G * (4 * SMALL + s.T * taps * (45 if s.T <= 400 else 180)), 0, 10)
    products = s.B * s.T * s.G * taps * (-(-p // 16) * 16) * (-(-q // 16) * 16)
    return Cost(products * 8 // 5, 4 * s.K * s.B * prod(block.shape), 10)


METHODS = (
    Method("unfolded", unfolded, False, lambda b: _windows(b) * prod(b.kernel), _unfolded_cost),
    Method("by lines", lined, False, _of_line, _lined_cost),
    Method("by taps", tapped, True, _windows, _tapped_cost),
    Method("depthwise", depthwise, True, lambda b: max(_windows(b), b.points[:, 0].numel()), _depthwise_cost),
    Method("grouped", grouped, False, lambda b: _windows(b), _grouped_cost),
)
