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

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from gramjd import gramians, prepared
from gramjd.blocks import Block, Lookup, flatten, is_zero, merge, unflatten
from gramjd.complexes import real_block, real_dtype
from gramjd.contraction import Options
from gramjd.contraction.accumulator import Sink
from gramjd.contraction.options import Limits
from gramjd.contraction.outputs import Output
from gramjd.contraction.products import Part
from gramjd.internals import is_ours, runs_plainly
from gramjd.jacobian.projection import Projection
from gramjd.jacobian.sketches.common import Live, Sketches, factor_of
from gramjd.jacobian.sketches.counting import counted
from gramjd.jacobian.sketches.dense import by_lookups, by_products
from gramjd.jacobian.sketches.factoring import factored
from gramjd.rounding import own_precision

__all__ = ["SketchSum", "sketch"]

_SPARSE = 4  # entries of a table in use, for each that one sample looks up, from which on rows are not built


@own_precision
def sketch(parts: Sequence[Part], names: Sequence[str], shapes: Sequence[Sequence[int]], K: int,
           projection: Projection, options: Options, like: Tensor) -> Tensor:  # fmt: skip
    """``J Ω [K, B, dim]``, for real parameters of these shapes.

    Raises:
        ValueError: two parameters have one name, and would share their rows of ``Ω``.
    """
    if len(set(names)) < len(names):
        twice = next(name for name in names if list(names).count(name) > 1)
        raise ValueError(f"A sketch knows parameters by name, and two are named {twice!r}: rename one.")
    plain, samples = runs_plainly([like]), [part.samples for part in parts]
    keep = plain and _keeps(projection, options)
    tensors, structure = flatten([part.live(number) for number in range(len(names)) for part in parts])

    def sketched(tensors: Sequence[Tensor]) -> tuple[list[Tensor], None]:
        limits = _limits(options, like)
        kind: Any = {"dtype": limits.dtype, "device": like.device}
        totals = [torch.zeros(K, size, projection.dim, **kind) for size in samples]
        sketches = Sketches(projection, limits, keep, plain, totals)
        mine = unflatten(structure, tensors)
        for number, (name, shape) in enumerate(zip(names, shapes, strict=True)):
            some = mine[number * len(parts) : (number + 1) * len(parts)]
            live = [(n, block) for n, blocks in enumerate(some) for block in merge(blocks)]
            if live:
                _add(live, name, tuple(shape), sketches)
        return [torch.cat(sketches.totals, 1) / projection.dim**0.5], None

    if not keep:
        return sketched(tensors)[0][0]
    sizes = *map(tuple, shapes), K, *samples
    key = _key(projection, options, like.device), structure, *names, *sizes, like.dtype
    return prepared.call(sketched, key, tensors)[0][0]


class SketchSum(Sink):
    """Adds up the shares of parameters in the sketch of one output, for blocks that are not kept."""

    def __init__(self, projection: Projection, options: Options, device: torch.device) -> None:
        self.projection, self.options = projection, options
        self.total: Tensor | None = None  # [K, B, dim]
        self.plain = runs_plainly([])
        self.by_name = self.keep = self.plain and _keeps(projection, options)
        if self.keep:
            self.key = _key(projection, options, device)

    def add(self, blocks: Mapping[str, Sequence[Block]]) -> None:
        if self.keep:
            self.add_prepared(blocks)
        else:
            self._add_share(self._share(blocks))

    def reduce(self, blocks: Mapping[str, Sequence[Block]]) -> tuple[list[Tensor], Any]:
        """The sum of the shares of these parameters; the blocks where ``Ω`` is made anew in each call."""
        if not self.keep:
            return super().reduce(blocks)
        share = self._share(blocks)
        return ([] if share is None else [share]), None

    def take(self, names: Sequence[str], tensors: Sequence[Tensor], rest: Any) -> None:
        if not self.keep:
            super().take(names, tensors, rest)
            return
        for share in tensors:
            self._add_share(share)

    def _share(self, blocks: Mapping[str, Sequence[Block]]) -> Tensor | None:
        each = {name: list(map(real_block, mine)) for name, mine in blocks.items() if mine}
        if not each:
            return None
        first = next(iter(each.values()))[0]
        limits = _limits(self.options, factor_of(first))
        total = factor_of(first).new_zeros(*first.rows, self.projection.dim, dtype=limits.dtype)
        sketches = Sketches(self.projection, limits, self.keep, self.plain, [total])
        for name, mine in each.items():
            live = [(0, block) for block in merge([block for block in mine if not is_zero(block)])]
            if live:
                _add(live, name, mine[0].shape, sketches)
        return sketches.totals[0]

    def _add_share(self, share: Tensor | None) -> None:
        if share is None:
            return
        if self.total is None:
            self.total = share  # it is new memory
            return
        share = share.to(self.total.device)  # parameters may lie on several
        if self.plain and share.dtype == self.total.dtype:
            self.total.add_(share)
        else:
            self.total = self.total + share

    def result(self, output: Output, like: Tensor) -> Tensor:
        """The sum of all shares, ``[*shape, dim]``, at least in the dtype for a parameter ``like`` this."""
        total, dtype = self.total, self.options.accumulated(real_dtype(like.dtype))
        if total is None:
            size = output.objectives, output.samples, self.projection.dim
            total = torch.zeros(size, dtype=dtype, device=like.device)
        total = total.to(torch.promote_types(total.dtype, dtype)) / self.projection.dim**0.5
        return gramians.from_rows(total, output.shape, output.batch_dim)


def _limits(options: Options, like: Tensor) -> Limits:
    """The limits of a sketch of factors like this one."""
    dtype = options.accumulated(like.dtype)
    return Limits(max(1, options.budget(like.device) // dtype.itemsize), dtype)


def _keeps(projection: Projection, options: Options) -> bool:
    """Whether parts of ``Ω`` are kept for later calls, if nothing transforms them.

    For few samples, making the factors of Ω takes as long as their products. A budget has no room for them.
    """
    keep = projection.kind in ("factored", "countsketch") and options.memory_budget is None
    return keep and not torch.is_inference_mode_enabled()


def _key(projection: Projection, options: Options, device: torch.device) -> Hashable:
    """All that the ops of a sketch depend on besides blocks and names of parameters."""
    return "sketch", projection, *options.on(device)


def _add(live: Live, name: str, shape: tuple[int, ...], sketches: Sketches) -> None:
    """Add the shares of one parameter."""
    projection, limits = sketches.projection, sketches.limits
    sides = (shape[0], prod(shape[1:])) if shape else (1, 1)
    if projection.kind == "factored" and projection.columns(sides) != sides:  # whatever the blocks are
        factored(live, name, sides, sketches)
        return
    if projection.kind in ("factored", "countsketch"):
        counted(live, name, sides, sketches)
        return
    looked_up = [(n, b) for n, b in live if isinstance(b, Lookup) and is_ours(b.ids)]
    for n, block in looked_up:  # of a table, rows of Ω for the entries that are used
        used, ids = block.ids.unique(return_inverse=True)
        if ids.device.type == "cpu" and len(used) > _SPARSE * ids.shape[1]:
            sketches.add(n, by_lookups(block, ids, used, name, projection, limits), (0, block.rows[1]))
            continue
        few = replace(block, ids=ids, shape=(len(used), block.grain))
        by_products([(n, few)], name, sketches, used)
    done = {id(b) for _, b in looked_up}
    rest = [(n, b) for n, b in live if id(b) not in done]
    if rest:
        by_products(rest, name, sketches)
