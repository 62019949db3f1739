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

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod

import torch
from torch import Tensor

from gramjd import gramians
from gramjd.blocks import Block, Lookup, is_zero, merge
from gramjd.complexes import real_block, real_dtype
from gramjd.contraction import Options
from gramjd.contraction.accumulator import Sink
from gramjd.contraction.options import Limits
from gramjd.contraction.outputs import Output
from gramjd.contraction.products import Part
from gramjd.internals import is_ours, runs_plainly
from gramjd.jacobian.projection import Projection
from gramjd.jacobian.sketches.common import Live, Shares, factor_of
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
    limits, keep = _limits(projection, options, like)
    zeros = torch.zeros(K, sum(part.samples for part in parts), projection.dim, dtype=limits.dtype,
                        device=like.device)  # fmt: skip
    found = list(zeros.split([part.samples for part in parts], 1))
    for number, (name, shape) in enumerate(zip(names, shapes, strict=True)):
        live = [(n, block) for n, part in enumerate(parts) for block in merge(part.live(number))]
        if live:
            for n, share in _shares(live, name, tuple(shape), projection, limits, keep):
                found[n] = found[n] + share
    return torch.cat(found, 1) / projection.dim**0.5


class SketchSum(Sink):
    """Adds up the shares of parameters in the sketch of one output, for blocks that are not kept."""

    def __init__(self, projection: Projection, options: Options) -> None:
        self.projection, self.options = projection, options
        self.total: Tensor | None = None  # [K, B, dim]

    def add(self, blocks: Mapping[str, Sequence[Block]]) -> None:
        """Add the share of some parameters."""
        each = {name: list(map(real_block, mine)) for name, mine in blocks.items() if mine}
        if not each:
            return
        limits, keep = _limits(self.projection, self.options, factor_of(next(iter(each.values()))[0]))
        for name, mine in each.items():
            live = [(0, block) for block in merge([block for block in mine if not is_zero(block)])]
            for _, share in _shares(live, name, mine[0].shape, self.projection, limits, keep) if live else ():
                self.total = share if self.total is None else self.total + share  # of another dtype, perhaps

    def result(self, output: Output, like: Tensor) -> Tensor:
        """The sum of all shares, ``[*shape, dim]``, at least in the dtype for a parameter ``like`` this."""
        total, dtype = self.total, self.options.accumulated(real_dtype(like.dtype))
        if total is None:
            size = output.objectives, output.samples, self.projection.dim
            total = torch.zeros(size, dtype=dtype, device=like.device)
        total = total.to(torch.promote_types(total.dtype, dtype)) / self.projection.dim**0.5
        return gramians.from_rows(total, output.shape, output.batch_dim)


def _limits(projection: Projection, options: Options, like: Tensor) -> tuple[Limits, bool]:
    """The limits of a sketch of factors like this one, and whether parts of ``Ω`` are kept."""
    dtype = options.accumulated(like.dtype)
    limits = Limits(max(1, options.budget(like.device) // dtype.itemsize), dtype)
    # For few samples, making the factors of Ω takes as long as their products. A budget has no room for them.
    keep = projection.kind in ("factored", "countsketch") and options.memory_budget is None
    return limits, keep and runs_plainly([like]) and not torch.is_inference_mode_enabled()


def _shares(live: Live, name: str, shape: tuple[int, ...], projection: Projection, limits: Limits,
            keep: bool) -> Shares:  # fmt: skip
    """The shares of one parameter in the sketch."""
    sides = (shape[0], prod(shape[1:])) if shape else (1, 1)
    if projection.kind == "factored" and projection.columns(sides) != sides:  # whatever the blocks are
        yield from factored(live, name, sides, projection, limits, keep)
        return
    if projection.kind in ("factored", "countsketch"):
        yield from counted(live, name, sides, projection, limits, keep)
        return
    looked_up = [(n, b) for n, b in live if isinstance(b, Lookup) and is_ours(b.ids)]
    for n, block in looked_up:  # of a table, rows of Ω for the entries that are used
        used, ids = block.ids.unique(return_inverse=True)
        if ids.device.type == "cpu" and len(used) > _SPARSE * ids.shape[1]:
            yield n, by_lookups(block, ids, used, name, projection, limits)
            continue
        few = replace(block, ids=ids, shape=(len(used), block.grain))
        yield from by_products([(n, few)], name, projection, limits, keep, used)
    done = {id(b) for _, b in looked_up}
    rest = [(n, b) for n, b in live if id(b) not in done]
    if rest:
        yield from by_products(rest, name, projection, limits, keep)
